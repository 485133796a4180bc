//! What one task of attention computes: some rows of a segment, for one K/V head.

use super::{
    AttentionParams, KvRef, Segment, Span,
    partial::{Partial, scale},
};
use crate::{Isa, hadamard::rotate, pool::Parts};
use half::f16;
use std::ops::Range;

/// Positions whose softmax is computed apart and then merged: the unit of work in a decode step.
pub(super) const CHUNK: usize = 256;
/// Positions for which a row's maximum is updated once; divides `CHUNK`, a multiple of every ISA's four vectors.
pub(super) const TILE: usize = 128;

/// Where the rows of K or V lie, in elements.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub(super) head_stride: usize,
    pub(super) row_stride: usize,
    pub(super) head_dim: usize,
}

impl From<KvRef<'_>> for Rows {
    fn from(kv: KvRef<'_>) -> Self {
        Self { head_stride: kv.head_stride, row_stride: kv.row_stride, head_dim: kv.head_dim }
    }
}

/// The scales of integer rows, `[num_key_value_heads, positions]`.
#[derive(Clone, Copy)]
pub(super) struct Scales<'a> {
    pub(super) k: &'a [f16],
    pub(super) v: &'a [f16],
    /// Positions of a head.
    pub(super) positions: usize,
}

/// A call's operands.
#[derive(Clone, Copy)]
pub(super) struct Views<'a, E> {
    pub(super) params: &'a AttentionParams,
    pub(super) group: usize,
    /// Positions that a row attends, at most.
    pub(super) window: usize,
    pub(super) q: &'a [f32],
    pub(super) k: Rows,
    pub(super) v: Rows,
    pub(super) k_data: &'a [E],
    pub(super) v_data: &'a [E],
    /// Of integers, which are in the rotated basis of [`rotate`]; `None` for floats.
    pub(super) scales: Option<Scales<'a>>,
}

impl<E> Views<'_, E> {
    /// Queries (rows times heads of the group) of the largest item.
    pub(super) fn most_queries(&self) -> usize {
        self.rows_per_item() * self.group
    }

    /// Rows of an item, at most.
    pub(super) fn rows_per_item(&self) -> usize {
        (super::ITEM_ROWS / self.group).max(1)
    }

    /// Length of a [`Partial`]'s memory.
    pub(super) fn partial_len(&self) -> usize {
        (self.most_queries() * (2 + self.v.head_dim)).next_multiple_of(16)
    }

    /// Length of the memory that attending a chunk needs.
    pub(super) fn work_len(&self) -> usize {
        self.queries_len() + self.keys_len() + self.values_len() + MOST_TILE_ROWS * TILE
    }

    /// Scaled queries.
    pub(super) fn queries_len(&self) -> usize {
        (self.most_queries() * self.k.head_dim).next_multiple_of(16)
    }

    /// A transposed tile of K, and the scales of its columns.
    pub(super) fn keys_len(&self) -> usize {
        (self.k.head_dim + 1) * TILE
    }

    /// A tile of V in `bf16`, whole vectors a row; or scales, and then a tile in 8-bit integers.
    pub(super) fn values_len(&self) -> usize {
        self.v.head_dim.next_multiple_of(32) * TILE / 2 + TILE
    }
}

/// The largest `Simd::TILE_ROWS`.
const MOST_TILE_ROWS: usize = 6;

/// Some consecutive rows of a segment, with the query heads of one K/V head.
#[derive(Clone, Copy)]
pub(super) struct Item<'a, E> {
    pub(super) views: Views<'a, E>,
    pub(super) segment: &'a Segment<'a>,
    pub(super) kv_head: usize,
    /// First row within `q`.
    pub(super) row: usize,
    pub(super) rows: usize,
    /// Position of the first row in its context.
    pub(super) position: usize,
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

    pub(super) fn queries(&self) -> usize {
        self.rows * self.views.group
    }

    /// Positions that `query` attends.
    pub(super) fn visible(&self, query: usize) -> Range<usize> {
        let end = self.position + query / self.views.group + 1;
        end.saturating_sub(self.views.window)..end
    }

    /// The queries, in the order of their numbers.
    pub(super) fn each_query(&self) -> impl Iterator<Item = &'a [f32]> {
        let Views { params, group, q, k, .. } = self.views;
        let (rows, heads) = (self.row..self.row + self.rows, self.kv_head * group..(self.kv_head + 1) * group);
        rows.flat_map(move |row| heads.clone().map(move |head| row * params.num_attention_heads + head))
            .map(move |at| &q[at * k.head_dim..][..k.head_dim])
    }

    /// K at a position of the cache.
    pub(super) fn key(&self, position: usize) -> *const E {
        let k = self.views.k;
        self.views.k_data.as_ptr().wrapping_add(self.kv_head * k.head_stride + position * k.row_stride)
    }

    /// V at a position of the cache.
    pub(super) fn value(&self, position: usize) -> *const E {
        let v = self.views.v;
        self.views.v_data.as_ptr().wrapping_add(self.kv_head * v.head_stride + position * v.row_stride)
    }

    /// Chunks that the item's rows attend.
    pub(super) fn chunks(&self) -> Range<usize> {
        self.visible(0).start / CHUNK..(self.position + self.rows).div_ceil(CHUNK)
    }

    /// The item's part of a softmax in this memory.
    pub(super) fn partial<'m>(&self, memory: &'m mut [f32]) -> Partial<'m> {
        Partial::new(memory, self.queries(), self.views.v.head_dim)
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
                if self.views.scales.is_some() {
                    // SAFETY: a `Cpu` holds only an available `isa`.
                    unsafe { rotate(isa, out) };
                }
            }
        }
    }
}

/// Positions of a tile that lie next to each other in the cache.
#[derive(Clone, Copy)]
pub(super) struct Run {
    /// First position within the tile.
    pub(super) at: usize,
    /// First position in the cache.
    pub(super) cache: usize,
    pub(super) len: usize,
}

/// Finds the runs of positions `from..to` of the segment's context, which are at most `TILE`.
pub(super) fn find_runs<'r>(segment: &Segment<'_>, from: usize, to: usize, runs: &'r mut [Run; TILE]) -> &'r [Run] {
    let mut found = 0;
    let mut start = 0;
    let own = Span { start: segment.own_start, len: segment.q_len };
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
