//! The register tile that every product is made of: a few rows of activations by four rows of weights.
//!
//! A sum over `k` is cut into blocks that depend on `k` alone, so that the activations of a tile stay in the first cache.
//! Within a block, vectors are added front to back and then their lanes; blocks are added in order.

use super::{Target, Tile};

/// How a vector of activations meets one of weights.
///
/// # Safety
/// Methods may run only where the processor has the instruction set that an implementation names, in a function
/// compiled for it; pointers are valid for the values that a method names.
pub(super) unsafe trait Dot: Copy {
    /// Stored activations and weights.
    type X: Copy;
    type W: Copy;
    /// A loaded vector of either, and of sums.
    type V: Copy;
    type Sums: Copy;
    /// What is known of a row's results before its products are summed.
    type Start: Copy;
    /// Values of `k` in a vector.
    const STEP: usize;
    /// Rows of a full tile, at most 6.
    const ROWS: usize;
    /// Most of `k` in a block: 6 rows of activations and 4 of weights fit into half of the first cache.
    const BLOCK: usize;

    unsafe fn zero() -> Self::Sums;
    unsafe fn start(self, place: Place<Self::W>) -> Self::Start;
    unsafe fn load_x(from: *const Self::X) -> Self::V;
    /// The first `n < STEP` values of `k`; the others are zero.
    unsafe fn load_x_n(from: *const Self::X, n: usize) -> Self::V;
    unsafe fn load_w(from: *const Self::W) -> Self::V;
    /// The first `n < STEP` values of `k`; the others are zero and their memory is not touched.
    unsafe fn load_w_n(from: *const Self::W, n: usize) -> Self::V;
    unsafe fn add_product(sums: Self::Sums, x: Self::V, w: Self::V) -> Self::Sums;
    /// What the sums of one row of activations with four of weights add to the output.
    unsafe fn finish(self, place: Place<Self::W>, start: Self::Start, sums: [Self::Sums; 4]) -> [f32; 4];
    unsafe fn prefetch(at: *const Self::W);
}

/// A row of activations, four rows of weights, and the part of `k` that their sums are of.
#[derive(Clone, Copy)]
pub(super) struct Place<W> {
    /// Counted from the tile's first.
    pub(super) row: usize,
    pub(super) column: usize,
    /// The first column's weights of this part of `k`.
    pub(super) w: *const W,
    /// Values from one column's weights to the next; 0 where there is only one, four times.
    pub(super) w_stride: usize,
    pub(super) start: usize,
    pub(super) len: usize,
    /// The number of this part.
    pub(super) nth: usize,
}

/// Operands of a tile; `x` and `w` point at its first row and column.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a, D: Dot> {
    pub(super) dot: D,
    pub(super) x: *const D::X,
    /// Values from one row of `x` to the next.
    pub(super) stride: usize,
    pub(super) w: *const D::W,
    pub(super) k: usize,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) to: Target,
}

/// Computes a tile of an output.
///
/// # Safety
/// `x` is `[rows, stride]` with `stride >= k`, `w` `[columns, k]`, `bias` `[columns]`, `to` has room for the tile.
#[inline(always)]
pub(super) unsafe fn multiply<D: Dot>(operands: Operands<'_, D>, tile: Tile) {
    let block = block_of(operands.k, D::BLOCK);
    // SAFETY: the caller's promise.
    unsafe {
        if tile.rows <= D::ROWS {
            // Weights that are read once are read front to back.
            for column in (0..tile.columns).step_by(4) {
                for (nth, start) in (0..operands.k).step_by(block).enumerate() {
                    let part = Part { column, columns: (tile.columns - column).min(4), start, len: block, nth };
                    by_rows(operands, 0, tile.rows, part);
                }
            }
        } else {
            for (nth, start) in (0..operands.k).step_by(block).enumerate() {
                for row in (0..tile.rows).step_by(D::ROWS) {
                    let part = Part { column: 0, columns: tile.columns, start, len: block, nth };
                    by_rows(operands, row, (tile.rows - row).min(D::ROWS), part);
                }
            }
        }
    }
}

/// Values of `k` in a block of at most `most`, a multiple of 64: blocks are as even as can be, and start at such multiples.
pub(super) fn block_of(k: usize, most: usize) -> usize {
    k.div_ceil(k.div_ceil(most)).next_multiple_of(64)
}

/// Some columns of the output and a block of `k`.
#[derive(Clone, Copy)]
struct Part {
    column: usize,
    columns: usize,
    start: usize,
    /// Cut off at `k`.
    len: usize,
    nth: usize,
}

/// Calls `band` for a constant number of rows.
#[inline(always)]
unsafe fn by_rows<D: Dot>(operands: Operands<'_, D>, row: usize, rows: usize, part: Part) {
    // SAFETY: the caller's promise.
    unsafe {
        match rows {
            1 => band::<D, 1>(operands, row, part),
            2 => band::<D, 2>(operands, row, part),
            3 => band::<D, 3>(operands, row, part),
            4 => band::<D, 4>(operands, row, part),
            5 => band::<D, 5>(operands, row, part),
            _ => band::<D, 6>(operands, row, part),
        }
    }
}

/// `R` rows by the part's columns.
#[inline(always)]
unsafe fn band<D: Dot, const R: usize>(operands: Operands<'_, D>, row: usize, part: Part) {
    let Operands { dot, x, stride, w, k, bias, to } = operands;
    let Part { column, columns, start, len, nth } = part;
    let len = len.min(k - start);
    // Only the first block finds the output's old content, and adds the bias.
    let (to, bias) = if start == 0 { (to, bias) } else { (to.accumulating(), None) };
    let end = column + columns;
    let mut column = column;
    // SAFETY: the caller's promise.
    unsafe {
        let x = x.add(row * stride + start);
        while column + 4 <= end {
            let w = w.add(column * k + start);
            let first = Place { row, column, w, w_stride: k, start, len, nth };
            let starts = starts::<D, R>(dot, first);
            let sums = dots::<D, R>(x, stride, first);
            for r in 0..R {
                to.put4(row + r, column, dot.finish(Place { row: row + r, ..first }, starts[r], sums[r]), bias);
            }
            column += 4;
        }
        while column < end {
            let w = w.add(column * k + start);
            let first = Place { row, column, w, w_stride: 0, start, len, nth };
            let starts = starts::<D, R>(dot, first);
            let sums = dots::<D, R>(x, stride, first);
            for r in 0..R {
                to.put(row + r, column, dot.finish(Place { row: row + r, ..first }, starts[r], sums[r])[0], bias);
            }
            column += 1;
        }
    }
}

/// [`Dot::start`] of `R` rows from that of `first` on.
#[inline(always)]
unsafe fn starts<D: Dot, const R: usize>(dot: D, first: Place<D::W>) -> [D::Start; R] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut starts = [dot.start(first); R];
        for r in 1..R {
            starts[r] = dot.start(Place { row: first.row + r, ..first });
        }
        starts
    }
}

/// Lane-wise sums of `R` rows of activations, from that of `first` on, with its rows of weights.
#[inline(always)]
unsafe fn dots<D: Dot, const R: usize>(x: *const D::X, stride: usize, first: Place<D::W>) -> [[D::Sums; 4]; R] {
    /// Bytes ahead of a weight to ask for, at least: far enough for memory to answer in time.
    const FAR: usize = 8192;
    // SAFETY: the caller's promise: reads lie below `len` in their row. Prefetches may be of any address.
    unsafe {
        let Place { w, w_stride, len, .. } = first;
        let mut sums = [[D::zero(); 4]; R];
        let ahead = (4 * w_stride * size_of::<D::W>()).max(FAR);
        let whole = len - len % D::STEP;
        let mut i = 0;
        while i < whole {
            let at = w.add(i);
            let next = at.wrapping_byte_add(ahead);
            D::prefetch(next);
            D::prefetch(next.wrapping_add(w_stride));
            D::prefetch(next.wrapping_add(2 * w_stride));
            D::prefetch(next.wrapping_add(3 * w_stride));
            if R < 4 {
                // One vector of weights at a time: twelve sums, three rows and it are the sixteen registers of AVX2.
                let x: [D::V; R] = std::array::from_fn(|r| D::load_x(x.add(r * stride + i)));
                for c in 0..4 {
                    let w = D::load_w(at.add(c * w_stride));
                    for r in 0..R {
                        sums[r][c] = D::add_product(sums[r][c], x[r], w);
                    }
                }
            } else {
                let w: [D::V; 4] = std::array::from_fn(|c| D::load_w(at.add(c * w_stride)));
                for r in 0..R {
                    let x = D::load_x(x.add(r * stride + i));
                    for c in 0..4 {
                        sums[r][c] = D::add_product(sums[r][c], x, w[c]);
                    }
                }
            }
            i += D::STEP;
        }
        if i < len {
            let (at, n) = (w.add(i), len - i);
            let w = [
                D::load_w_n(at, n),
                D::load_w_n(at.add(w_stride), n),
                D::load_w_n(at.add(2 * w_stride), n),
                D::load_w_n(at.add(3 * w_stride), n),
            ];
            for r in 0..R {
                let x = D::load_x_n(x.add(r * stride + i), n);
                for c in 0..4 {
                    sums[r][c] = D::add_product(sums[r][c], x, w[c]);
                }
            }
        }
        sums
    }
}
