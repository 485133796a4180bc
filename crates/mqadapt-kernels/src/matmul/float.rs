//! `f32` activations with `f32`, `f16` or `bf16` weights, widened in registers.

use super::{Target, Tile};
use crate::simd::{Element, Simd, kernel};

kernel! {
    pub(super) fn block<W: Element> = block_body(
        x: *const f32, weight: *const W, k: usize, tile: Tile, bias: Option<&[f32]>, to: Target,
    )
}

/// `x` and `weight` point at the tile's first row and column.
///
/// # Safety
/// `x` is `[rows, k]`, `weight` `[columns, k]`, `bias` `[columns]`.
#[inline(always)]
unsafe fn block_body<S: Simd, W: Element>(
    x: *const f32,
    weight: *const W,
    k: usize,
    tile: Tile,
    bias: Option<&[f32]>,
    to: Target,
) {
    let mut row = 0;
    while row < tile.rows {
        let rows = (tile.rows - row).min(S::TILE_ROWS);
        // SAFETY: the caller's promise.
        unsafe {
            let x = x.add(row * k);
            match rows {
                1 => band::<S, W, 1>(x, weight, k, row, tile.columns, bias, to),
                2 => band::<S, W, 2>(x, weight, k, row, tile.columns, bias, to),
                3 => band::<S, W, 3>(x, weight, k, row, tile.columns, bias, to),
                4 => band::<S, W, 4>(x, weight, k, row, tile.columns, bias, to),
                5 => band::<S, W, 5>(x, weight, k, row, tile.columns, bias, to),
                _ => band::<S, W, 6>(x, weight, k, row, tile.columns, bias, to),
            }
        }
        row += rows;
    }
}

/// `R` rows of the tile, all its columns.
#[inline(always)]
unsafe fn band<S: Simd, W: Element, const R: usize>(
    x: *const f32,
    weight: *const W,
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
            let sums = dots::<S, W, R>(x, w, k);
            for (offset, sums) in sums.into_iter().enumerate() {
                to.put(row + offset, column, wanted, sums, bias);
            }
        }
        column += 4;
    }
}

/// Dot products of `R` rows of activations, `k` apart, with four rows of weights.
#[inline(always)]
unsafe fn dots<S: Simd, W: Element, const R: usize>(x: *const f32, w: [*const W; 4], k: usize) -> [[f32; 4]; R] {
    // SAFETY: the caller's promise: all reads lie below `k` in their row.
    unsafe {
        let mut sums = [[S::zero(); 4]; R];
        let whole = k - k % S::LANES;
        let mut i = 0;
        while i < whole {
            let w = [
                W::load::<S>(w[0].add(i)),
                W::load::<S>(w[1].add(i)),
                W::load::<S>(w[2].add(i)),
                W::load::<S>(w[3].add(i)),
            ];
            for r in 0..R {
                let x = S::load(x.add(r * k + i));
                for c in 0..4 {
                    sums[r][c] = S::fma(x, w[c], sums[r][c]);
                }
            }
            i += S::LANES;
        }
        if i < k {
            let n = k - i;
            let w = [
                W::load_n::<S>(w[0].add(i), n),
                W::load_n::<S>(w[1].add(i), n),
                W::load_n::<S>(w[2].add(i), n),
                W::load_n::<S>(w[3].add(i), n),
            ];
            for r in 0..R {
                let x = S::load_n(x.add(r * k + i), n);
                for c in 0..4 {
                    sums[r][c] = S::fma(x, w[c], sums[r][c]);
                }
            }
        }
        let mut out = [[0.0; 4]; R];
        for r in 0..R {
            out[r] = S::sum4(sums[r]);
        }
        out
    }
}
