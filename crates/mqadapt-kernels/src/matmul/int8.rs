//! `f32` activations with 8-bit weights: integers widened in registers, one scale per block along `k`.

use super::{Target, Tile};
use crate::{
    Int8Weights,
    simd::{Simd, kernel},
};

kernel! {
    pub(super) fn block = block_body(
        x: *const f32, stride: usize, weight: Int8Weights<'_>, k: usize, tile: Tile, bias: Option<&[f32]>, to: Target,
    )
}

/// `x` points at the tile's first row, `weight` starts at its first column.
///
/// # Safety
/// `x` is `[rows, stride]`, `weight` at least `[columns, k]` with its scales, `bias` `[columns]`.
#[inline(always)]
unsafe fn block_body<S: Simd>(
    x: *const f32,
    stride: usize,
    weight: Int8Weights<'_>,
    k: usize,
    tile: Tile,
    bias: Option<&[f32]>,
    to: Target,
) {
    // Two sets of sums are live, so half the rows of a float tile.
    let step = S::TILE_ROWS.div_ceil(2);
    for row in (0..tile.rows).step_by(step) {
        let rows = (tile.rows - row).min(step);
        for column in (0..tile.columns).step_by(4) {
            let wanted = (tile.columns - column).min(4);
            // SAFETY: the caller's promise.
            unsafe {
                let x = x.add(row * stride);
                let sums = match rows {
                    1 => dots::<S, 1>(x, stride, weight, k, column, wanted),
                    2 => dots::<S, 2>(x, stride, weight, k, column, wanted),
                    _ => dots::<S, 3>(x, stride, weight, k, column, wanted),
                };
                for (offset, sums) in sums.into_iter().enumerate().take(rows) {
                    for (c, sum) in sums.into_iter().enumerate().take(wanted) {
                        to.put(row + offset, column + c, sum, bias);
                    }
                }
            }
        }
    }
}

/// Dot products of `R` rows of activations with four rows of weights from `column`, of which `wanted` exist.
#[inline(always)]
unsafe fn dots<S: Simd, const R: usize>(
    x: *const f32,
    stride: usize,
    weight: Int8Weights<'_>,
    k: usize,
    column: usize,
    wanted: usize,
) -> [[f32; 4]; 3] {
    let blocks = k.div_ceil(weight.block);
    // Columns that are not wanted repeat the last one.
    let at = [0, 1, 2, 3].map(|offset: usize| column + offset.min(wanted - 1));
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [[S::zero(); 4]; R];
        for block in 0..blocks {
            let start = block * weight.block;
            let len = weight.block.min(k - start);
            let w = at.map(|column| weight.values.as_ptr().add(column * k + start));
            let part = partial::<S, R>(x.add(start), stride, w, len);
            for c in 0..4 {
                let scale = S::splat(*weight.scales.get_unchecked(at[c] * blocks + block));
                for r in 0..R {
                    sums[r][c] = S::fma(scale, part[r][c], sums[r][c]);
                }
            }
        }
        let mut out = [[0.0; 4]; 3];
        for r in 0..R {
            out[r] = S::sum4(sums[r]);
        }
        out
    }
}

/// Bytes ahead of a weight to ask for: far enough for memory to answer in time.
const FAR: usize = 8192;

/// Lane-wise partial sums of one block of `len` columns of `k`.
#[inline(always)]
unsafe fn partial<S: Simd, const R: usize>(
    x: *const f32,
    stride: usize,
    w: [*const i8; 4],
    len: usize,
) -> [[S::V; 4]; R] {
    // SAFETY: the caller's promise: all reads lie below `len` in their row.
    unsafe {
        let mut sums = [[S::zero(); 4]; R];
        let whole = len - len % S::LANES;
        let mut i = 0;
        while i < whole {
            for c in 0..4 {
                S::prefetch(w[c].wrapping_add(i + FAR));
                let w = S::load_i8(w[c].add(i));
                for r in 0..R {
                    sums[r][c] = S::fma(S::load(x.add(r * stride + i)), w, sums[r][c]);
                }
            }
            i += S::LANES;
        }
        if i < len {
            for c in 0..4 {
                let w = S::load_i8_n(w[c].add(i), len - i);
                for r in 0..R {
                    sums[r][c] = S::fma(S::load_n(x.add(r * stride + i), len - i), w, sums[r][c]);
                }
            }
        }
        sums
    }
}
