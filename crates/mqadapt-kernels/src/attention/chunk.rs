//! Attention of a block of query rows to one chunk of positions: tiles with an online softmax.

use super::{
    partial::Partial,
    work_item::{CHUNK, Item, Run, TILE, find_runs},
};
use crate::{activation::softcap_lanes, simd::Simd};
use std::ops::Range;

/// How scores and weighted sums are computed.
///
/// # Safety
/// As for [`Simd`]: methods run only where `S` may, and pointers are valid for what is named.
pub(super) unsafe trait Method {
    type S: Simd;
    type E: Copy;

    /// Gathers the item's scaled queries, `[queries, k.head_dim]`, in the method's own form.
    unsafe fn prepare(item: &Item<'_, Self::E>, to: &mut [f32]);
    /// Prepares the K and V of `runs`, which make up the first `end` positions of a tile.
    unsafe fn tile(item: &Item<'_, Self::E>, runs: &[Run], end: usize, keys: &mut [f32], values: &mut [f32]);
    /// `to[r, p] = q[r] · k[p]` for `R` queries and the positions of the tile below `columns`, or a few more.
    unsafe fn score<const R: usize>(q: *const f32, keys: *const f32, dim: usize, columns: usize, to: *mut f32);
    /// `to[r] += scores[r, p] * v[p]` for `R` queries and the positions of the tile below `columns`.
    unsafe fn weigh<const R: usize>(
        item: &Item<'_, Self::E>,
        runs: &[Run],
        columns: usize,
        values: &[f32],
        scores: &mut [f32],
        to: *mut f32,
    );
}

/// Calls a function with the number of rows as its last constant parameter.
macro_rules! by_rows {
    ($rows:expr, $M:ident::$name:ident($($arg:expr),*)) => {
        match $rows {
            1 => $M::$name::<1>($($arg),*),
            2 => $M::$name::<2>($($arg),*),
            3 => $M::$name::<3>($($arg),*),
            4 => $M::$name::<4>($($arg),*),
            5 => $M::$name::<5>($($arg),*),
            _ => $M::$name::<6>($($arg),*),
        }
    };
}

/// Attends one chunk of positions.
///
/// # Safety
/// The call's shapes were checked; `part` and `work` were made for the item; besides as for [`Method`].
#[inline(always)]
pub(super) unsafe fn attend_body<M: Method>(
    item: &Item<'_, M::E>,
    chunk: usize,
    part: &mut Partial<'_>,
    work: &mut [f32],
) {
    let views = &item.views;
    let (k_dim, v_dim, queries) = (views.k.head_dim, views.v.head_dim, item.queries());
    let (q, rest) = work.split_at_mut(views.queries_len());
    let (keys, rest) = rest.split_at_mut(views.keys_len());
    let (values, scores) = rest.split_at_mut(views.values_len());
    let end = (item.position + item.rows).min((chunk + 1) * CHUNK);
    // A window may begin behind the first tile, for all rows.
    let first = item.visible(0).start.max(chunk * CHUNK) / TILE * TILE;
    let mut memory = [Run { at: 0, cache: 0, len: 0 }; TILE];
    part.clear();
    // SAFETY: the caller's promise; `q` has `queries` rows, `keys` is `[k_dim, TILE]`, `scores` `[MOST_TILE_ROWS, TILE]`.
    unsafe {
        M::prepare(item, q);
        for tile in (first..end).step_by(TILE) {
            let tile_end = end.min(tile + TILE);
            let runs = find_runs(item.segment, tile, tile_end, &mut memory);
            M::tile(item, runs, tile_end - tile, keys, values);
            for query in (0..queries).step_by(M::S::TILE_ROWS) {
                let rows = (queries - query).min(M::S::TILE_ROWS);
                let seen = item.visible(query).start.max(tile)..item.visible(query + rows - 1).end.min(tile_end);
                if seen.is_empty() {
                    continue;
                }
                let columns = seen.end - tile;
                let q = q.as_ptr().add(query * k_dim);
                by_rows!(rows, M::score(q, keys.as_ptr(), k_dim, columns, scores.as_mut_ptr()));
                for row in 0..rows {
                    let visible = item.visible(query + row);
                    let visible = visible.start.max(tile) - tile..visible.end.clamp(tile, tile_end) - tile;
                    let scores = &mut scores[row * TILE..][..TILE];
                    soften::<M::S>(scores, columns, visible, views.params.softcap, part, query + row);
                }
                let to = part.values.as_mut_ptr().add(query * v_dim);
                by_rows!(rows, M::weigh(item, runs, columns, values, scores, to));
            }
        }
    }
}

/// Bytes ahead of a key to ask for: far enough for memory to answer in time.
const FAR: usize = 16 << 10;

/// Asks for the V of a run, and for the K that follow it.
#[inline(always)]
pub(super) unsafe fn fetch<S: Simd, E: Copy>(item: &Item<'_, E>, run: &Run) {
    let (k, v) = (item.views.k, item.views.v);
    // SAFETY: the caller's promise; a prefetch may be of any address.
    unsafe {
        fetch_rows::<S, E>(item.key(run.cache).wrapping_byte_add(FAR), run.len, k.row_stride, k.head_dim);
        fetch_rows::<S, E>(item.value(run.cache), run.len, v.row_stride, v.head_dim);
    }
}

/// Asks for `rows` rows of `dim` values, `stride` apart.
#[inline(always)]
unsafe fn fetch_rows<S: Simd, E: Copy>(at: *const E, rows: usize, stride: usize, dim: usize) {
    const LINE: usize = 64;
    // Rows without gaps are one long row.
    let (rows, dim) = if stride == dim { (1, rows * dim) } else { (rows, dim) };
    for row in 0..rows {
        let start = at.wrapping_add(row * stride);
        let mut byte = 0;
        while byte < dim * size_of::<E>() {
            // SAFETY: the caller's promise.
            unsafe { S::prefetch(start.wrapping_byte_add(byte)) };
            byte += LINE;
        }
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
    // Whole vectors, and whole vectors of halves.
    let columns = columns.next_multiple_of(S::LANES.max(32));
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
