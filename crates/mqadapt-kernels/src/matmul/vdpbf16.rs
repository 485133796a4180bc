//! `bf16` activations with `bf16` weights by `vdpbf16ps`: exact products of pairs, `f32` sums.

use super::{Target, Tile};
use crate::simd::{Simd, avx512::Avx512};
use half::bf16;
use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_maskz_loadu_epi16, _mm512_setzero_ps,
};

/// `bf16` values in a vector.
const LANES: usize = 32;

/// `x` and `weight` point at the tile's first row and column; rows of `x` are `stride` apart and padded with zeros.
///
/// # Safety
/// The processor has AVX-512 BF16; `x` is `[rows, stride]` with `stride` a multiple of 32 no less than `k`,
/// `weight` `[columns, k]`, `bias` `[columns]`.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn block(
    x: *const bf16,
    stride: usize,
    weight: *const bf16,
    k: usize,
    tile: Tile,
    bias: Option<&[f32]>,
    to: Target,
) {
    let mut row = 0;
    while row < tile.rows {
        let rows = (tile.rows - row).min(6);
        // SAFETY: the caller's promise.
        unsafe {
            let x = x.add(row * stride);
            match rows {
                1 => band::<1>(x, stride, weight, k, row, tile.columns, bias, to),
                2 => band::<2>(x, stride, weight, k, row, tile.columns, bias, to),
                3 => band::<3>(x, stride, weight, k, row, tile.columns, bias, to),
                4 => band::<4>(x, stride, weight, k, row, tile.columns, bias, to),
                5 => band::<5>(x, stride, weight, k, row, tile.columns, bias, to),
                _ => band::<6>(x, stride, weight, k, row, tile.columns, bias, to),
            }
        }
        row += rows;
    }
}

/// `R` rows of the tile, all its columns.
#[allow(clippy::too_many_arguments)] // one level of a loop nest
#[inline(always)]
unsafe fn band<const R: usize>(
    x: *const bf16,
    stride: usize,
    weight: *const bf16,
    k: usize,
    row: usize,
    columns: usize,
    bias: Option<&[f32]>,
    to: Target,
) {
    let mut column = 0;
    while column < columns {
        let wanted = (columns - column).min(4);
        // SAFETY: the caller's promise; columns that are not wanted repeat the last one.
        unsafe {
            let w = [0, 1, 2, 3].map(|offset: usize| weight.add((column + offset.min(wanted - 1)) * k));
            let sums = dots::<R>(x, stride, w, k);
            for (offset, sums) in sums.into_iter().enumerate() {
                to.put(row + offset, column, wanted, sums, bias);
            }
        }
        column += 4;
    }
}

#[inline(always)]
unsafe fn pairs(values: __m512i) -> __m512bh {
    // SAFETY: two views of 512 bits.
    unsafe { std::mem::transmute(values) }
}

/// Dot products of `R` rows of activations with four rows of weights.
#[inline(always)]
unsafe fn dots<const R: usize>(x: *const bf16, stride: usize, w: [*const bf16; 4], k: usize) -> [[f32; 4]; R] {
    // SAFETY: the caller's promise: reads of `w` lie below `k`, reads of `x` below `stride`.
    unsafe {
        let mut sums = [[_mm512_setzero_ps(); 4]; R];
        let whole = k - k % LANES;
        let mut i = 0;
        while i < whole {
            let mut wide = [pairs(_mm512_loadu_si512(w[0].add(i).cast())); 4];
            for c in 1..4 {
                wide[c] = pairs(_mm512_loadu_si512(w[c].add(i).cast()));
            }
            for r in 0..R {
                let x = pairs(_mm512_loadu_si512(x.add(r * stride + i).cast()));
                for c in 0..4 {
                    sums[r][c] = _mm512_dpbf16_ps(sums[r][c], x, wide[c]);
                }
            }
            i += LANES;
        }
        if i < k {
            let mask = (1u32 << (k - i)) - 1;
            let mut wide = [pairs(_mm512_maskz_loadu_epi16(mask, w[0].add(i).cast())); 4];
            for c in 1..4 {
                wide[c] = pairs(_mm512_maskz_loadu_epi16(mask, w[c].add(i).cast()));
            }
            for r in 0..R {
                let x = pairs(_mm512_loadu_si512(x.add(r * stride + i).cast()));
                for c in 0..4 {
                    sums[r][c] = _mm512_dpbf16_ps(sums[r][c], x, wide[c]);
                }
            }
        }
        let mut out = [[0.0; 4]; R];
        for r in 0..R {
            out[r] = Avx512::sum4(sums[r]);
        }
        out
    }
}
