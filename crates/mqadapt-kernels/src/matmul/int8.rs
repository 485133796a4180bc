//! `f32` activations with 8-bit weights: integers widened in registers, one scale per block along `k`.

use super::{Target, Tile};
use crate::{
    Int8Weights,
    simd::{Simd, kernel},
};

kernel! {
    pub(super) fn block = block_body(
        x: *const f32, weight: Int8Weights<'_>, k: usize, tile: Tile, bias: Option<&[f32]>, to: Target,
    )
}

/// `x` points at the tile's first row, `weight` starts at its first column.
///
/// # Safety
/// `x` is `[rows, k]`, `weight` at least `[columns, k]` with its scales, `bias` `[columns]`.
#[inline(always)]
unsafe fn block_body<S: Simd>(
    x: *const f32,
    weight: Int8Weights<'_>,
    k: usize,
    tile: Tile,
    bias: Option<&[f32]>,
    to: Target,
) {
    // Two sets of sums are live, so half the rows of a float tile.
    let step = S::TILE_ROWS.div_ceil(2);
    let mut row = 0;
    while row < tile.rows {
        let rows = (tile.rows - row).min(step);
        // SAFETY: the caller's promise.
        unsafe {
            let x = x.add(row * k);
            match rows {
                1 => band::<S, 1>(x, weight, k, row, tile.columns, bias, to),
                2 => band::<S, 2>(x, weight, k, row, tile.columns, bias, to),
                _ => band::<S, 3>(x, weight, k, row, tile.columns, bias, to),
            }
        }
        row += rows;
    }
}

/// `R` rows of the tile, all its columns.
#[inline(always)]
unsafe fn band<S: Simd, const R: usize>(
    x: *const f32,
    weight: Int8Weights<'_>,
    k: usize,
    row: usize,
    columns: usize,
    bias: Option<&[f32]>,
    to: Target,
) {
    let blocks = k.div_ceil(weight.block);
    let mut column = 0;
    while column < columns {
        let wanted = (columns - column).min(4);
        // Columns that are not wanted repeat the last one.
        let at = [0, 1, 2, 3].map(|offset: usize| column + offset.min(wanted - 1));
        // SAFETY: the caller's promise.
        unsafe {
            let mut sums = [[S::zero(); 4]; R];
            for block in 0..blocks {
                let start = block * weight.block;
                let len = weight.block.min(k - start);
                let w = at.map(|column| weight.values.as_ptr().add(column * k + start));
                let part = partial::<S, R>(x.add(start), k, w, len);
                for c in 0..4 {
                    let scale = S::splat(*weight.scales.get_unchecked(at[c] * blocks + block));
                    for r in 0..R {
                        sums[r][c] = S::fma(scale, part[r][c], sums[r][c]);
                    }
                }
            }
            for r in 0..R {
                to.put(row + r, column, wanted, S::sum4(sums[r]), bias);
            }
        }
        column += 4;
    }
}

/// Lane-wise partial sums of one block of `len` columns of `k`.
#[inline(always)]
unsafe fn partial<S: Simd, const R: usize>(x: *const f32, k: usize, w: [*const i8; 4], len: usize) -> [[S::V; 4]; R] {
    // SAFETY: the caller's promise: all reads lie below `len` in their row.
    unsafe {
        let mut sums = [[S::zero(); 4]; R];
        let whole = len - len % S::LANES;
        let mut i = 0;
        while i < whole {
            for c in 0..4 {
                let w = S::load_i8(w[c].add(i));
                for r in 0..R {
                    sums[r][c] = S::fma(S::load(x.add(r * k + i)), w, sums[r][c]);
                }
            }
            i += S::LANES;
        }
        if i < len {
            for c in 0..4 {
                let w = S::load_i8_n(w[c].add(i), len - i);
                for r in 0..R {
                    sums[r][c] = S::fma(S::load_n(x.add(r * k + i), len - i), w, sums[r][c]);
                }
            }
        }
        sums
    }
}
