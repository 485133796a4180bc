//! Attention of a block of query rows to one chunk of positions: tiles with an online softmax.

use super::{AttentionParams, KvRef, Segment};
use crate::{
    Isa,
    act::softcap_lanes,
    pool::Parts,
    simd::{Element, Simd, kernel},
};
use half::{bf16, f16};
use std::ops::Range;

/// Positions whose softmax is computed apart and then merged: the unit of work in a decode step.
pub(super) const CHUNK: usize = 256;
/// Positions for which a row's maximum is updated once; divides `CHUNK`, a multiple of every ISA's four vectors.
const TILE: usize = 128;

/// Dtypes of a cache.
pub(super) trait Floats: Element {}
impl Floats for f32 {}
impl Floats for f16 {}
impl Floats for bf16 {}

/// A call's operands.
#[derive(Clone, Copy)]
pub(super) struct Views<'a, E> {
    pub(super) params: &'a AttentionParams,
    pub(super) group: usize,
    pub(super) q: &'a [f32],
    pub(super) k: KvRef<'a>,
    pub(super) v: KvRef<'a>,
    pub(super) k_data: &'a [E],
    pub(super) v_data: &'a [E],
}

impl<E> Views<'_, E> {
    /// Queries (rows times heads of the group) of the largest item.
    fn most_queries(&self) -> usize {
        (super::ITEM_ROWS / self.group).max(1) * self.group
    }

    /// Length of a [`Partial`]'s memory.
    pub(super) fn partial_len(&self) -> usize {
        (self.most_queries() * (2 + self.v.head_dim)).next_multiple_of(16)
    }

    /// Length of [`attend`]'s memory: scaled q, a transposed tile of K, scores of a few rows.
    pub(super) fn work_len(&self) -> usize {
        let dim = self.k.head_dim;
        (self.most_queries() * dim).next_multiple_of(16) + dim * TILE + MOST_TILE_ROWS * TILE
    }
}

/// The largest `Simd::TILE_ROWS`.
const MOST_TILE_ROWS: usize = 6;

/// Some consecutive rows of a segment, with the query heads of one K/V head.
#[derive(Clone, Copy)]
pub(super) struct Item<'a, E> {
    views: Views<'a, E>,
    segment: &'a Segment<'a>,
    kv_head: usize,
    /// First row within `q`.
    row: usize,
    rows: usize,
    /// Position of the first row in its context.
    position: usize,
}

impl<'a, E> Item<'a, E> {
    pub(super) fn new(
        views: Views<'a, E>,
        segment: &'a Segment<'a>,
        first_row: usize,
        most_rows: usize,
        kv_head: usize,
    ) -> Self {
        let rows = most_rows.min(segment.q_len - first_row);
        let position = segment.prefix_len() + first_row;
        Self { views, segment, kv_head, row: segment.q_start + first_row, rows, position }
    }

    fn queries(&self) -> usize {
        self.rows * self.views.group
    }

    /// Positions that `query` attends.
    fn visible(&self, query: usize) -> Range<usize> {
        let end = self.position + query / self.views.group + 1;
        self.views.params.sliding_window.map_or(0, |window| end.saturating_sub(window))..end
    }

    /// Chunks that the item's rows attend.
    pub(super) fn chunks(&self) -> Range<usize> {
        self.visible(0).start / CHUNK..(self.position + self.rows).div_ceil(CHUNK)
    }

    /// Divides by the sums and writes the item's part of the output.
    pub(super) fn finish(&self, isa: Isa, total: &mut Partial<'_>, out: Parts<'_, f32>) {
        let (group, dim) = (self.views.group, self.views.v.head_dim);
        let heads = self.views.params.num_attention_heads;
        for row in 0..self.rows {
            let first = ((self.row + row) * heads + self.kv_head * group) * dim;
            // SAFETY: items write disjoint rows or heads.
            let out = unsafe { out.part(first, group * dim) };
            for (head, out) in out.chunks_exact_mut(dim).enumerate() {
                let query = row * group + head;
                let inverse = 1.0 / total.sums[query];
                out.copy_from_slice(&total.values[query * dim..][..dim]);
                // SAFETY: a slice of `dim`; a `Cpu` holds only an available `isa`.
                unsafe { scale(isa, out.as_mut_ptr(), dim, inverse) };
            }
        }
    }
}

/// Softmax over some positions, before the division: per query the largest score, the sum of `e^(score - largest)`, and
/// the values weighted so.
pub(super) struct Partial<'a> {
    largest: &'a mut [f32],
    sums: &'a mut [f32],
    /// `[queries, v.head_dim]`
    values: &'a mut [f32],
}

impl<'a> Partial<'a> {
    pub(super) fn new<E>(memory: &'a mut [f32], item: &Item<'_, E>) -> Self {
        let queries = item.queries();
        let (largest, rest) = memory.split_at_mut(queries);
        let (sums, rest) = rest.split_at_mut(queries);
        Self { largest, sums, values: &mut rest[..queries * item.views.v.head_dim] }
    }

    pub(super) fn clear(&mut self) {
        self.largest.fill(f32::NEG_INFINITY);
        self.sums.fill(0.0);
        self.values.fill(0.0);
    }

    /// Takes in the positions of `next`.
    pub(super) fn merge(&mut self, isa: Isa, next: &Partial<'_>) {
        let dim = self.values.len() / self.sums.len();
        for query in 0..self.sums.len() {
            let (a, b) = (self.largest[query], next.largest[query]);
            if b == f32::NEG_INFINITY {
                continue;
            }
            let (to, from) = (&mut self.values[query * dim..][..dim], &next.values[query * dim..][..dim]);
            if a == f32::NEG_INFINITY {
                to.copy_from_slice(from);
                (self.largest[query], self.sums[query]) = (b, next.sums[query]);
                continue;
            }
            let largest = if a > b { a } else { b };
            // SAFETY: two slices of `dim`; a `Cpu` holds only an available `isa`.
            let [old, new] = unsafe { blend(isa, to.as_mut_ptr(), from.as_ptr(), dim, a - largest, b - largest) };
            self.sums[query] = self.sums[query] * old + next.sums[query] * new;
            self.largest[query] = largest;
        }
    }
}

kernel! { fn scale = scale_body(x: *mut f32, n: usize, factor: f32) }
kernel! { fn blend = blend_body(to: *mut f32, from: *const f32, n: usize, to_log: f32, from_log: f32) -> [f32; 2] }

/// # Safety
/// `x` has `n` values.
#[inline(always)]
unsafe fn scale_body<S: Simd>(x: *mut f32, n: usize, factor: f32) {
    let mut i = 0;
    while i < n {
        // SAFETY: the caller's promise.
        unsafe { S::store_some(x.add(i), n - i, S::mul(S::load_some(x.add(i), n - i), S::splat(factor))) };
        i += S::LANES;
    }
}

/// `to = to * e^to_log + from * e^from_log`; returns the two factors.
///
/// # Safety
/// `to` and `from` have `n` values.
#[inline(always)]
unsafe fn blend_body<S: Simd>(to: *mut f32, from: *const f32, n: usize, to_log: f32, from_log: f32) -> [f32; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let (a, b) = (S::exp(S::splat(to_log)), S::exp(S::splat(from_log)));
        let mut i = 0;
        while i < n {
            let left = n - i;
            let scaled = S::mul(S::load_some(from.add(i), left), b);
            S::store_some(to.add(i), left, S::fma(S::load_some(to.add(i), left), a, scaled));
            i += S::LANES;
        }
        [S::max_lane(a), S::max_lane(b)]
    }
}

kernel! {
    pub(super) fn attend<E: Floats> = attend_body(item: &Item<'_, E>, chunk: usize, part: &mut Partial<'_>, work: &mut [f32])
}

/// Positions of a tile that lie next to each other in the cache.
#[derive(Clone, Copy)]
struct Run {
    /// First position within the tile.
    at: usize,
    /// First position in the cache.
    cache: usize,
    len: usize,
}

/// Finds the runs of positions `from..to` of the segment's context, which are at most `TILE`.
fn find_runs<'r>(segment: &Segment<'_>, from: usize, to: usize, runs: &'r mut [Run; TILE]) -> &'r [Run] {
    let mut found = 0;
    let mut start = 0;
    let own = super::Span { start: segment.own_start, len: segment.q_len };
    for span in segment.prefix.iter().chain([&own]) {
        let (first, last) = (from.max(start), to.min(start + span.len));
        if first < last {
            runs[found] = Run { at: first - from, cache: span.start + first - start, len: last - first };
            found += 1;
        }
        start += span.len;
        if start >= to {
            break;
        }
    }
    &runs[..found]
}

/// Calls a function with the number of rows as its last constant parameter.
macro_rules! by_rows {
    ($rows:expr, $name:ident::<$($g:ty),*>($($arg:expr),*)) => {
        match $rows {
            1 => $name::<$($g,)* 1>($($arg),*),
            2 => $name::<$($g,)* 2>($($arg),*),
            3 => $name::<$($g,)* 3>($($arg),*),
            4 => $name::<$($g,)* 4>($($arg),*),
            5 => $name::<$($g,)* 5>($($arg),*),
            _ => $name::<$($g,)* 6>($($arg),*),
        }
    };
}

/// # Safety
/// The call's shapes were checked; `part` and `work` were made for the item.
#[inline(always)]
unsafe fn attend_body<S: Simd, E: Floats>(item: &Item<'_, E>, chunk: usize, part: &mut Partial<'_>, work: &mut [f32]) {
    let Views { k, v, k_data, v_data, .. } = item.views;
    let dim = k.head_dim;
    let queries = item.queries();
    let (q, rest) = work.split_at_mut((item.views.most_queries() * dim).next_multiple_of(16));
    let (keys, scores) = rest.split_at_mut(dim * TILE);
    let end = (item.position + item.rows).min((chunk + 1) * CHUNK);
    let mut runs = [Run { at: 0, cache: 0, len: 0 }; TILE];
    part.clear();
    copy_queries(item, q);
    let mut tile = chunk * CHUNK;
    while tile < end {
        let tile_end = end.min(tile + TILE);
        // A window may begin behind this tile, for all rows.
        if item.visible(0).start >= tile_end {
            tile += TILE;
            continue;
        }
        let runs = find_runs(item.segment, tile, tile_end, &mut runs);
        for run in runs {
            let first = item.kv_head * k.head_stride + run.cache * k.row_stride;
            // SAFETY: the run lies within the cache; its positions lie within the tile.
            unsafe {
                let to = keys.as_mut_ptr().add(run.at);
                S::transpose(k_data.as_ptr().add(first), k.row_stride, run.len, dim, to, TILE);
            }
        }
        let mut query = 0;
        while query < queries {
            let rows = (queries - query).min(S::TILE_ROWS);
            let seen = item.visible(query).start.max(tile)..item.visible(query + rows - 1).end.min(tile_end);
            if !seen.is_empty() {
                // SAFETY: `q` has `queries` rows, `keys` is `[dim, TILE]`, `scores` `[MOST_TILE_ROWS, TILE]`, runs lie within V.
                unsafe {
                    let columns = seen.end - tile;
                    let q = q.as_ptr().add(query * dim);
                    by_rows!(rows, score::<S>(q, keys.as_ptr(), dim, columns, scores.as_mut_ptr()));
                    for row in 0..rows {
                        let visible = item.visible(query + row);
                        let visible = visible.start.max(tile) - tile..visible.end.clamp(tile, tile_end) - tile;
                        let scores = &mut scores[row * TILE..][..TILE];
                        soften::<S>(scores, columns, visible, item.views.params.softcap, part, query + row);
                    }
                    let first = item.kv_head * v.head_stride;
                    let values = part.values.as_mut_ptr().add(query * v.head_dim);
                    for run in runs.iter().filter(|run| run.at < columns) {
                        let len = run.len.min(columns - run.at);
                        let from = v_data.as_ptr().add(first + run.cache * v.row_stride);
                        let weights = scores.as_ptr().add(run.at);
                        by_rows!(rows, weigh::<S, E>(weights, from, v.row_stride, len, v.head_dim, values));
                    }
                }
            }
            query += rows;
        }
        tile += TILE;
    }
}

/// Gathers the item's queries, `[rows, group, dim]`, scaled.
fn copy_queries<E>(item: &Item<'_, E>, to: &mut [f32]) {
    let Views { params, group, q, k, .. } = item.views;
    let len = group * k.head_dim;
    for (row, to) in to.chunks_exact_mut(len).enumerate().take(item.rows) {
        let first = ((item.row + row) * params.num_attention_heads + item.kv_head * group) * k.head_dim;
        to.iter_mut().zip(&q[first..][..len]).for_each(|(to, from)| *to = from * params.scale);
    }
}

/// `scores[r, p] = q[r] · k[p]` for `R` queries and the positions of the tile below `columns`, or a few more.
#[inline(always)]
unsafe fn score<S: Simd, const R: usize>(q: *const f32, keys: *const f32, dim: usize, columns: usize, to: *mut f32) {
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

/// Turns a query's scores for a tile into weights `e^(score - largest)`, zero where not visible, and brings
/// the query's running maximum, sum and values up to date.
#[inline(always)]
unsafe fn soften<S: Simd>(
    scores: &mut [f32],
    columns: usize,
    visible: Range<usize>,
    softcap: Option<f32>,
    part: &mut Partial<'_>,
    query: usize,
) {
    let columns = columns.next_multiple_of(S::LANES);
    if visible.is_empty() {
        scores[..columns].fill(0.0);
        return;
    }
    let dim = part.values.len() / part.sums.len();
    // SAFETY: all vectors lie below `columns`, which a tile holds; values of the query lie within the part.
    unsafe {
        let to = scores.as_mut_ptr();
        if let Some(cap) = softcap {
            for i in (0..columns).step_by(S::LANES) {
                S::store(to.add(i), softcap_lanes::<S>(S::load(to.add(i)), S::splat(cap)));
            }
        }
        scores[..visible.start].fill(f32::NEG_INFINITY);
        scores[visible.end..columns].fill(f32::NEG_INFINITY);
        let mut top = S::splat(f32::NEG_INFINITY);
        for i in (0..columns).step_by(S::LANES) {
            top = S::max(top, S::load(to.add(i)));
        }
        let (old, top) = (part.largest[query], S::max_lane(top));
        let largest = if old > top { old } else { top };
        let (mut sum, offset) = (S::zero(), S::splat(largest));
        for i in (0..columns).step_by(S::LANES) {
            let weight = S::exp(S::sub(S::load(to.add(i)), offset));
            sum = S::add(sum, weight);
            S::store(to.add(i), weight);
        }
        let mut factor = 1.0;
        if old != largest {
            let wide = S::exp(S::splat(old - largest));
            factor = S::max_lane(wide);
            let values = part.values.as_mut_ptr().add(query * dim);
            for i in (0..dim).step_by(S::LANES) {
                S::store_some(values.add(i), dim - i, S::mul(S::load_some(values.add(i), dim - i), wide));
            }
        }
        part.sums[query] = part.sums[query] * factor + S::sum(sum);
        part.largest[query] = largest;
    }
}

/// `to[r] += weights[r, p] * v[p]` for `R` queries and `len` positions.
#[inline(always)]
unsafe fn weigh<S: Simd, E: Element, const R: usize>(
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
