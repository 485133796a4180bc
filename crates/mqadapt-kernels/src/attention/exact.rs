//! Attention in `f32`: K and V widened in registers, nothing rounded.

use super::{
    chunk::{Method, attend_body, fetch},
    partial::Partial,
    work_item::{Item, Run, TILE},
};
use crate::simd::{Element, Simd, kernel};
use std::marker::PhantomData;

kernel! {
    pub(super) fn attend<E: Element> = attend_exact(
        item: &Item<'_, E>, chunk: usize, part: &mut Partial<'_>, work: &mut [f32],
    )
}

/// # Safety
/// As for [`attend_body`].
#[inline(always)]
unsafe fn attend_exact<S: Simd, E: Element>(
    item: &Item<'_, E>,
    chunk: usize,
    part: &mut Partial<'_>,
    work: &mut [f32],
) {
    // SAFETY: the caller's promise.
    unsafe { attend_body::<Widened<S, E>>(item, chunk, part, work) };
}

/// Products of `f32` with a cache of `E` widened to it.
pub(super) struct Widened<S, E>(PhantomData<(S, E)>);

// SAFETY: passes the contract on.
unsafe impl<S: Simd, E: Element> Method for Widened<S, E> {
    type S = S;
    type E = E;

    unsafe fn prepare(item: &Item<'_, E>, to: &mut [f32]) {
        for (query, to) in item.each_query().zip(to.chunks_exact_mut(item.views.k.head_dim)) {
            to.iter_mut().zip(query).for_each(|(to, from)| *to = from * item.views.params.scale);
        }
    }

    #[inline(always)]
    unsafe fn tile(item: &Item<'_, E>, runs: &[Run], _end: usize, keys: &mut [f32], _values: &mut [f32]) {
        let k = item.views.k;
        for run in runs {
            // SAFETY: the run lies within the cache; its positions lie within the tile.
            unsafe {
                fetch::<S, E>(item, run);
                S::transpose(
                    item.key(run.cache),
                    k.row_stride,
                    run.len,
                    k.head_dim,
                    keys.as_mut_ptr().add(run.at),
                    TILE,
                );
            }
        }
    }

    /// `scores[r, p] = q[r] · k[p]` for `R` queries and the positions of the tile below `columns`, or a few more.
    #[inline(always)]
    unsafe fn score<const R: usize>(q: *const f32, keys: *const f32, dim: usize, columns: usize, to: *mut f32) {
        let mut column = 0;
        while column < columns {
            // SAFETY: the caller's promise; four vectors divide a tile.
            unsafe {
                let mut sums = [[S::zero(); 4]; R];
                for d in 0..dim {
                    let key = keys.add(d * TILE + column);
                    let key = [
                        S::load(key),
                        S::load(key.add(S::LANES)),
                        S::load(key.add(2 * S::LANES)),
                        S::load(key.add(3 * S::LANES)),
                    ];
                    for r in 0..R {
                        let q = S::splat(*q.add(r * dim + d));
                        for c in 0..4 {
                            sums[r][c] = S::fma(q, key[c], sums[r][c]);
                        }
                    }
                }
                for r in 0..R {
                    for c in 0..4 {
                        S::store(to.add(r * TILE + column + c * S::LANES), sums[r][c]);
                    }
                }
            }
            column += 4 * S::LANES;
        }
    }

    #[inline(always)]
    unsafe fn weigh<const R: usize>(
        item: &Item<'_, E>,
        runs: &[Run],
        columns: usize,
        _values: &[f32],
        scores: &mut [f32],
        to: *mut f32,
    ) {
        for run in runs.iter().filter(|run| run.at < columns) {
            let len = run.len.min(columns - run.at);
            // SAFETY: the run lies within the cache, and within the tile.
            unsafe {
                let v = item.value(run.cache);
                let weights = scores.as_ptr().add(run.at);
                weigh_run::<S, E, R>(weights, v, item.views.v.row_stride, len, item.views.v.head_dim, to);
            }
        }
    }
}

/// `to[r] += weights[r, p] * v[p]` for `R` queries and `len` positions.
#[inline(always)]
pub(super) unsafe fn weigh_run<S: Simd, E: Element, const R: usize>(
    weights: *const f32,
    v: *const E,
    stride: usize,
    len: usize,
    dim: usize,
    to: *mut f32,
) {
    let mut d = 0;
    // SAFETY: the caller's promise.
    unsafe {
        while d + 4 * S::LANES <= dim {
            let mut sums = [[S::zero(); 4]; R];
            for r in 0..R {
                for c in 0..4 {
                    sums[r][c] = S::load(to.add(r * dim + d + c * S::LANES));
                }
            }
            for p in 0..len {
                let v = v.add(p * stride + d);
                let v = [
                    E::load::<S>(v),
                    E::load::<S>(v.add(S::LANES)),
                    E::load::<S>(v.add(2 * S::LANES)),
                    E::load::<S>(v.add(3 * S::LANES)),
                ];
                for r in 0..R {
                    let weight = S::splat(*weights.add(r * TILE + p));
                    for c in 0..4 {
                        sums[r][c] = S::fma(weight, v[c], sums[r][c]);
                    }
                }
            }
            for r in 0..R {
                for c in 0..4 {
                    S::store(to.add(r * dim + d + c * S::LANES), sums[r][c]);
                }
            }
            d += 4 * S::LANES;
        }
        while d < dim {
            let left = dim - d;
            let mut sums = [S::zero(); R];
            for r in 0..R {
                sums[r] = S::load_some(to.add(r * dim + d), left);
            }
            for p in 0..len {
                let v = E::load_some::<S>(v.add(p * stride + d), left);
                for r in 0..R {
                    sums[r] = S::fma(S::splat(*weights.add(r * TILE + p)), v, sums[r]);
                }
            }
            for r in 0..R {
                S::store_some(to.add(r * dim + d), left, sums[r]);
            }
            d += S::LANES;
        }
    }
}
