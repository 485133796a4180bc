//! Causal attention over a K/V cache, grouped by K/V head: K and V are never expanded.
//!
//! Positions are cut into chunks and tiles by their number in the row's own context, wherever they lie in
//! the cache. A row's softmax runs online over its tiles, and its chunks merge in order. Work is split at rows,
//! K/V heads and chunks, so its order of additions is the same in a prefill, a decode step and a packed batch.

use crate::{Cpu, FloatsMut, FloatsRef, Isa, Precision, pool::Parts, scratch, simd::Element};
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
mod bf16;
mod chunk;
mod exact;
mod packed;
mod packed_store;
mod partial;
mod store;
mod work_item;

#[cfg(test)]
mod packed_tests;
#[cfg(test)]
mod tests;

pub use packed_store::{KvBits, PackedKv, PackedKvMut};
use partial::Partial;
use work_item::{Item, Rows, Scales, Views};

/// K or V of one layer: `head_dim` contiguous values for each K/V head and position.
///
/// The value `d` of K/V head `h` at position `p` is `data[h * head_stride + p * row_stride + d]`.
#[derive(Debug, Clone, Copy)]
pub struct KvRef<'a> {
    /// The cache's values; K and V share a dtype.
    pub data: FloatsRef<'a>,
    /// Elements from one K/V head to the next: `capacity * head_dim` in a cache `[heads, capacity, head_dim]`.
    pub head_stride: usize,
    /// Elements from one position to the next.
    pub row_stride: usize,
    /// Values of a head; those of V may differ from those of K.
    pub head_dim: usize,
}

/// [`KvRef`], to be written by [`Cpu::store_kv`].
#[derive(Debug)]
pub struct KvMut<'a> {
    /// The cache's values.
    pub data: FloatsMut<'a>,
    /// Elements from one K/V head to the next.
    pub head_stride: usize,
    /// Elements from one position to the next.
    pub row_stride: usize,
    /// Values of a head.
    pub head_dim: usize,
}

/// A contiguous range of cache positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Span {
    /// First cache position.
    pub start: usize,
    /// Number of positions.
    pub len: usize,
}

/// Consecutive query rows that continue one context: a prompt, a decode step, or a node of a token trie.
///
/// Row `i` of the segment attends all of `prefix`, then the positions `own_start..=own_start + i`. Its position
/// in the context, which counts for the sliding window, is `prefix` length + `i`.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    /// First row of `q`.
    pub q_start: usize,
    /// Number of rows.
    pub q_len: usize,
    /// What precedes the segment, in order: the K/V of its ancestors, shared with other segments.
    pub prefix: &'a [Span],
    /// Cache position of the K/V of the segment's first row; those of its other rows follow.
    pub own_start: usize,
}

/// What a layer's attention looks like.
#[derive(Debug, Clone, Copy)]
pub struct AttentionParams {
    /// Query heads; a multiple of `num_key_value_heads`.
    pub num_attention_heads: usize,
    /// K/V heads. Query head `h` reads K/V head `h / (num_attention_heads / num_key_value_heads)`.
    pub num_key_value_heads: usize,
    /// Factor on `q · k`, usually `head_dim^-0.5`.
    pub scale: f32,
    /// `cap * tanh(score / cap)` on scaled scores (Gemma 2).
    pub softcap: Option<f32>,
    /// Positions that a row attends, its own included; `None` for all.
    pub sliding_window: Option<usize>,
    /// [`Precision::Fast`] rounds q and the weights of V to `bf16` where the cache is `bf16` and the processor
    /// multiplies pairs of them ([`Isa::Avx512Bf16`]).
    pub precision: Precision,
}

impl Segment<'_> {
    fn prefix_len(&self) -> usize {
        self.prefix.iter().map(|span| span.len).sum()
    }
}

impl Cpu {
    /// `out = softmax(mask(scale * q · k^T)) · v` for every segment, in one parallel region.
    ///
    /// `q` is `[rows, num_attention_heads, k.head_dim]`, `out` `[rows, num_attention_heads, v.head_dim]`; rows that
    /// belong to no segment are left alone. Segments do not overlap in `q`.
    ///
    /// # Panics
    /// If a shape does not fit, K and V differ in dtype, or a segment reads outside of the cache.
    pub fn attention(
        &self,
        params: &AttentionParams,
        q: &[f32],
        k: KvRef<'_>,
        v: KvRef<'_>,
        segments: &[Segment<'_>],
        out: &mut [f32],
    ) {
        let rows = [k.into(), v.into()];
        check(params, q, rows, [k.data.len(), v.data.len()], segments, out);
        macro_rules! attend {
            ($k:expr, $v:expr, $chunk:expr) => {
                self.attend(views(params, q, rows, [$k, $v], None), segments, $chunk, out)
            };
        }
        match (k.data, v.data) {
            (FloatsRef::F32(a), FloatsRef::F32(b)) => attend!(a, b, exact::attend),
            (FloatsRef::F16(a), FloatsRef::F16(b)) => attend!(a, b, exact::attend),
            #[cfg(target_arch = "x86_64")]
            (FloatsRef::Bf16(a), FloatsRef::Bf16(b)) if self.takes_pairs(params, k) => attend!(a, b, bf16::attend),
            (FloatsRef::Bf16(a), FloatsRef::Bf16(b)) => attend!(a, b, exact::attend),
            _ => panic!("K and V share a dtype"),
        }
    }

    /// [`Self::attention`] over a cache of integers; K, V and `head_dim` are alike.
    ///
    /// # Panics
    /// As [`Self::attention`].
    pub fn attention_packed(
        &self,
        params: &AttentionParams,
        q: &[f32],
        k: PackedKv<'_>,
        v: PackedKv<'_>,
        segments: &[Segment<'_>],
        out: &mut [f32],
    ) {
        assert!(k.bits == v.bits && k.head_dim == v.head_dim && k.positions == v.positions, "K and V are alike");
        let row_stride = k.bits.row_bytes(k.head_dim);
        let rows = Rows { head_stride: k.positions * row_stride, row_stride, head_dim: k.head_dim };
        for kv in [k, v] {
            assert!(kv.scales.len() >= params.num_key_value_heads * kv.positions, "every row has a scale");
            // a row may be shorter than a head has values
            assert!(kv.values.len() >= params.num_key_value_heads * rows.head_stride, "every head has its rows");
        }
        let padded = k.values.len() + k.head_dim;
        check(params, q, [rows; 2], [padded; 2], segments, out);
        let inside = |start: usize, len: usize| assert!(start + len <= k.positions, "K/V lies outside of the cache");
        for segment in segments {
            inside(segment.own_start, segment.q_len);
            segment.prefix.iter().for_each(|span| inside(span.start, span.len));
        }
        let scales = Scales { k: k.scales, v: v.scales, positions: k.positions };
        let views = views(params, q, [rows; 2], [k.values, v.values], Some(scales));
        match k.bits {
            KvBits::Eight => self.attend(views, segments, packed::attend_int8, out),
            KvBits::Four => self.attend(views, segments, packed::attend_int4, out),
        }
    }

    /// Whether scores and sums are computed from pairs of `bf16`.
    #[cfg(target_arch = "x86_64")]
    fn takes_pairs(&self, params: &AttentionParams, k: KvRef<'_>) -> bool {
        self.isa == Isa::Avx512Bf16 && params.precision == Precision::Fast && k.head_dim.is_multiple_of(2)
    }

    fn attend<E: Element>(&self, views: Views<'_, E>, segments: &[Segment<'_>], attend: Attend<E>, out: &mut [f32]) {
        let kv_heads = views.params.num_key_value_heads;
        let rows_per_item = views.rows_per_item();
        let out = Parts::new(out);
        // Items before each segment: one per block of its rows; then each is taken once per K/V head.
        scratch::with(segments.len() + 1, |starts: &mut [u32]| {
            let mut blocks = 0;
            for (start, segment) in starts.iter_mut().zip(segments) {
                *start = blocks;
                blocks += segment.q_len.div_ceil(rows_per_item) as u32;
            }
            let starts = &starts[..segments.len()];
            let items = blocks as usize * kv_heads;
            let item = |index: usize| {
                let (block, kv_head) = (index / kv_heads, index % kv_heads);
                let at = starts.partition_point(|&start| start as usize <= block) - 1;
                let first_row = (block - starts[at] as usize) * rows_per_item;
                Item::new(views, &segments[at], first_row, rows_per_item, kv_head)
            };
            if items >= 4 * self.threads() || self.threads() == 1 {
                self.attend_whole(views, items, item, attend, out);
            } else {
                self.attend_split(views, items, item, attend, out);
            }
        });
    }

    /// One task per item, all its chunks in order.
    fn attend_whole<'a, E: Element>(
        &self,
        views: Views<'a, E>,
        items: usize,
        item: impl Fn(usize) -> Item<'a, E> + Sync,
        attend: Attend<E>,
        out: Parts<'_, f32>,
    ) {
        let (partial_len, work_len) = (views.partial_len(), views.work_len());
        let each = 2 * partial_len + work_len;
        scratch::with(each * self.threads(), |buffer: &mut [f32]| {
            let buffer = Parts::new(buffer);
            self.pool.run(items, |index, worker| {
                // Later rows of a segment see more: the heaviest items first.
                let item = item(items - 1 - index);
                // SAFETY: each worker has its own part.
                let buffer = unsafe { buffer.part(worker * each, each) };
                let (total, rest) = buffer.split_at_mut(partial_len);
                let (part, work) = rest.split_at_mut(partial_len);
                let mut total = item.partial(total);
                let mut part = item.partial(part);
                total.clear();
                for chunk in item.chunks() {
                    // SAFETY: shapes were checked by `check`.
                    unsafe { attend(self.isa, &item, chunk, &mut part, work) };
                    total.merge(self.isa, &part);
                }
                item.finish(self.isa, &mut total, out);
            });
        });
    }

    /// One task per item and chunk, for a few long items as in a decode step; then the chunks merge in order.
    fn attend_split<'a, E: Element>(
        &self,
        views: Views<'a, E>,
        items: usize,
        item: impl Fn(usize) -> Item<'a, E> + Sync,
        attend: Attend<E>,
        out: Parts<'_, f32>,
    ) {
        let (partial_len, work_len) = (views.partial_len(), views.work_len());
        let most = (0..items).map(|index| item(index).chunks().len()).max().unwrap_or(0);
        scratch::with(work_len * self.threads(), |work: &mut [f32]| {
            scratch::with(items * most * partial_len, |parts: &mut [f32]| {
                let (work, parts) = (Parts::new(work), Parts::new(parts));
                let part = |index: usize, chunk: usize| {
                    // SAFETY: each item's chunk has its own part, in use by one task at a time.
                    unsafe { parts.part((index * most + chunk) * partial_len, partial_len) }
                };
                self.pool.run(items * most, |task, worker| {
                    let (index, nth) = (task / most, task % most);
                    let item = item(index);
                    let Range { start, end } = item.chunks();
                    if start + nth < end {
                        // SAFETY: each worker has its own part.
                        let work = unsafe { work.part(worker * work_len, work_len) };
                        let mut part = item.partial(part(index, nth));
                        // SAFETY: shapes were checked by `check`.
                        unsafe { attend(self.isa, &item, start + nth, &mut part, work) };
                    }
                });
                for index in 0..items {
                    let item = item(index);
                    // The first chunk's part is merged into as if it were empty before: it holds the same bits.
                    let mut total = item.partial(part(index, 0));
                    for nth in 1..item.chunks().len() {
                        total.merge(self.isa, &item.partial(part(index, nth)));
                    }
                    item.finish(self.isa, &mut total, out);
                }
            });
        });
    }
}

/// Attends one chunk of an item's positions.
type Attend<E> = unsafe fn(Isa, &Item<'_, E>, usize, &mut Partial<'_>, &mut [f32]);

/// Query rows times heads of a group in one task, about: a multiple of every `Simd::TILE_ROWS`.
const ITEM_ROWS: usize = 60;

fn views<'a, E>(
    params: &'a AttentionParams,
    q: &'a [f32],
    [k, v]: [Rows; 2],
    [k_data, v_data]: [&'a [E]; 2],
    scales: Option<Scales<'a>>,
) -> Views<'a, E> {
    let group = params.num_attention_heads / params.num_key_value_heads;
    let window = params.sliding_window.unwrap_or(usize::MAX);
    Views { params, group, window, q, k, v, k_data, v_data, scales }
}

/// `lengths`: elements of K and V.
fn check(
    params: &AttentionParams,
    q: &[f32],
    [k, v]: [Rows; 2],
    lengths: [usize; 2],
    segments: &[Segment<'_>],
    out: &[f32],
) {
    let (heads, kv_heads) = (params.num_attention_heads, params.num_key_value_heads);
    assert!(
        kv_heads > 0 && heads.is_multiple_of(kv_heads),
        "{heads} query heads do not group over {kv_heads} K/V heads"
    );
    assert!(k.head_dim > 0 && v.head_dim > 0, "head_dim is above 0");
    assert!(params.sliding_window != Some(0), "a row attends itself");
    let (q_row, out_row) = (heads * k.head_dim, heads * v.head_dim);
    assert!(
        q.len().is_multiple_of(q_row) && q.len() / q_row * out_row == out.len(),
        "q and out are [rows, heads, head_dim]"
    );
    let rows = q.len() / q_row;
    let fits = |start: usize, len: usize| {
        [k, v].iter().zip(lengths).all(|(kv, elements)| {
            let last = (start + len - 1) * kv.row_stride + (kv_heads - 1) * kv.head_stride;
            last + kv.head_dim <= elements
        })
    };
    for segment in segments.iter().filter(|segment| segment.q_len > 0) {
        let Segment { q_start, q_len, prefix, own_start } = *segment;
        assert!(q_start <= rows && q_len <= rows - q_start, "segment rows {q_start}+{q_len} of {rows}");
        assert!(fits(own_start, q_len), "segment K/V {own_start}+{q_len} lies outside of the cache");
        for span in prefix.iter().filter(|span| span.len > 0) {
            assert!(fits(span.start, span.len), "prefix K/V {}+{} lies outside of the cache", span.start, span.len);
        }
    }
}
