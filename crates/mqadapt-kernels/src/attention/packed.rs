//! Attention over a cache of integers: levels are widened in registers, and scores and weights take the rows' scales.
//! Queries enter the rotated basis of the rows, and the result leaves it, once each.

use super::{
    chunk::{Method, attend_body, fetch},
    exact::{Widened, weigh_run},
    packed_store::LEVELS,
    partial::Partial,
    work_item::{Item, Run, TILE},
};
use crate::{
    hadamard::rotate_body,
    simd::{Simd, kernel},
};
use half::f16;
use std::marker::PhantomData;

kernel! { pub(super) fn attend_int8 = int8_body(item: &Item<'_, i8>, chunk: usize, part: &mut Partial<'_>, work: &mut [f32]) }
kernel! { pub(super) fn attend_int4 = int4_body(item: &Item<'_, i8>, chunk: usize, part: &mut Partial<'_>, work: &mut [f32]) }

/// # Safety
/// As for [`attend_body`].
#[inline(always)]
unsafe fn int8_body<S: Simd>(item: &Item<'_, i8>, chunk: usize, part: &mut Partial<'_>, work: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { attend_body::<Packed<S, false>>(item, chunk, part, work) };
}

/// # Safety
/// As for [`attend_body`].
#[inline(always)]
unsafe fn int4_body<S: Simd>(item: &Item<'_, i8>, chunk: usize, part: &mut Partial<'_>, work: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe { attend_body::<Packed<S, true>>(item, chunk, part, work) };
}

/// Products of `f32` with levels: of 8 bits as they lie, of 4 bits unpacked a tile at a time.
///
/// The memory of a tile of keys ends with the scales of its columns; that of values begins with them, and unpacked rows follow.
struct Packed<S, const FOUR: bool>(PhantomData<S>);

impl<S: Simd, const FOUR: bool> Packed<S, FOUR> {
    /// Unpacks the rows of a run of K or V to `to`, `[positions, dim]`.
    #[inline(always)]
    unsafe fn unpack(from: *const i8, stride: usize, len: usize, dim: usize, to: *mut i8) {
        let half = stride;
        for row in 0..len {
            // SAFETY: the caller's promise; of an odd number of values the last byte holds one.
            unsafe {
                let (from, to) = (from.add(row * stride), to.add(row * dim));
                S::look_up(&LEVELS, from, dim - half, to, to.add(half));
                if dim - half < half {
                    let last = (*from.add(half - 1)).cast_unsigned();
                    *to.add(half - 1) = LEVELS[usize::from(last & 15)];
                }
            }
        }
    }
}

/// Copies the scales of a run.
#[inline(always)]
unsafe fn widen<S: Simd>(from: &[f16], to: &mut [f32]) {
    let mut i = 0;
    while i < to.len() {
        let left = to.len() - i;
        // SAFETY: both have the same length.
        unsafe {
            let scales = if left >= S::LANES {
                S::load_f16(from.as_ptr().add(i))
            } else {
                S::load_f16_n(from.as_ptr().add(i), left)
            };
            S::store_some(to.as_mut_ptr().add(i), left, scales);
        }
        i += S::LANES;
    }
}

// SAFETY: passes the contract on.
unsafe impl<S: Simd, const FOUR: bool> Method for Packed<S, FOUR> {
    type S = S;
    type E = i8;

    #[inline(always)]
    unsafe fn prepare(item: &Item<'_, i8>, to: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe {
            Widened::<S, i8>::prepare(item, to);
            let dim = item.views.k.head_dim;
            to[..item.queries() * dim].chunks_exact_mut(dim).for_each(|query| rotate_body::<S>(query));
        }
    }

    #[inline(always)]
    unsafe fn tile(item: &Item<'_, i8>, runs: &[Run], end: usize, keys: &mut [f32], values: &mut [f32]) {
        let (k, v) = (item.views.k, item.views.v);
        let Some(scales) = item.views.scales else { return };
        let (keys, k_scales) = keys.split_at_mut(k.head_dim * TILE);
        let (v_scales, values) = values.split_at_mut(TILE);
        let rows = values.as_mut_ptr().cast::<i8>();
        // columns that no position fills are read by whole vectors
        k_scales[end..].fill(0.0);
        v_scales[end..].fill(0.0);
        for run in runs {
            let at = item.kv_head * scales.positions + run.cache;
            // SAFETY: the run lies within the cache, its positions within the tile.
            unsafe {
                widen::<S>(&scales.k[at..at + run.len], &mut k_scales[run.at..run.at + run.len]);
                widen::<S>(&scales.v[at..at + run.len], &mut v_scales[run.at..run.at + run.len]);
                fetch::<S, i8>(item, run);
                let (mut from, mut stride) = (item.key(run.cache), k.row_stride);
                if FOUR {
                    Self::unpack(from, stride, run.len, k.head_dim, rows);
                    (from, stride) = (rows.cast_const(), k.head_dim);
                }
                S::transpose(from, stride, run.len, k.head_dim, keys.as_mut_ptr().add(run.at), TILE);
            }
        }
        if FOUR {
            for run in runs {
                // SAFETY: as above.
                unsafe {
                    let to = rows.add(run.at * v.head_dim);
                    Self::unpack(item.value(run.cache), v.row_stride, run.len, v.head_dim, to);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn score<const R: usize>(q: *const f32, keys: *const f32, dim: usize, columns: usize, to: *mut f32) {
        // SAFETY: the caller's promise; vectors divide a tile, whose scales follow its keys.
        unsafe {
            Widened::<S, i8>::score::<R>(q, keys, dim, columns, to);
            scale_rows::<S, R>(to, keys.add(dim * TILE), columns);
        }
    }

    #[inline(always)]
    unsafe fn weigh<const R: usize>(
        item: &Item<'_, i8>,
        runs: &[Run],
        columns: usize,
        values: &[f32],
        scores: &mut [f32],
        to: *mut f32,
    ) {
        let (v, weights) = (item.views.v, scores.as_mut_ptr());
        // SAFETY: the caller's promise; the scales of the tile's values come before them.
        unsafe {
            scale_rows::<S, R>(weights, values.as_ptr(), columns);
            if FOUR {
                let rows = values.as_ptr().add(TILE).cast::<i8>();
                weigh_run::<S, i8, R>(weights, rows, v.head_dim, columns, v.head_dim, to);
            } else {
                for run in runs.iter().filter(|run| run.at < columns) {
                    let len = run.len.min(columns - run.at);
                    let (weights, rows) = (weights.add(run.at), item.value(run.cache));
                    weigh_run::<S, i8, R>(weights, rows, v.row_stride, len, v.head_dim, to);
                }
            }
        }
    }
}

/// Multiplies the columns of `R` rows of a tile by their scales.
#[inline(always)]
unsafe fn scale_rows<S: Simd, const R: usize>(rows: *mut f32, scales: *const f32, columns: usize) {
    for column in (0..columns).step_by(S::LANES) {
        // SAFETY: vectors divide a tile.
        unsafe {
            let scale = S::load(scales.add(column));
            for r in 0..R {
                let to = rows.add(r * TILE + column);
                S::store(to, S::mul(S::load(to), scale));
            }
        }
    }
}
