//! Activations as 8-bit integers with one scale a row.
//!
//! A row is `scale * (low + 256 * high)`. The scale lets values of up to [`SPREAD`] root mean squares fit into `low`, so
//! that a few large activations do not cost the others their precision (Dettmers et al. 2022, section 3, take such features
//! out into a product of their own); larger ones have a `high`, and only blocks of `k` that hold one are multiplied twice.

use super::tile::block_of;
use crate::{
    Cpu,
    pool::Parts,
    scratch,
    simd::{Simd, kernel},
};

/// Root mean squares of a row that 127 steps reach at least.
const SPREAD: f32 = 6.0;
/// Columns that share a mark of whether any has a `high`.
pub(super) const BLOCK: usize = 64;
/// The largest value of `low + 256 * high`.
const LARGEST: f32 = 32639.0;
/// Where a record of a row keeps its scale, the number of its blocks with a `high`, and then its offsets.
pub(super) const SCALE: usize = 0;
pub(super) const HIGHS: usize = 1;
pub(super) const OFFSETS: usize = 2;

/// Sizes of what activations of some width become.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    /// Values between rows of digits: whole vectors of every instruction set.
    pub(super) stride: usize,
    /// Values of `k` whose sums share an offset, and how many such parts there are.
    part: usize,
    pub(super) parts: usize,
    /// Words of a row's record.
    pub(super) record: usize,
}

impl Layout {
    pub(super) fn new(k: usize) -> Self {
        let part = block_of(k, PART);
        let (parts, blocks) = (k.div_ceil(part), k.div_ceil(BLOCK));
        Self { stride: blocks * BLOCK, part, parts, record: OFFSETS + parts + blocks }
    }
}

/// Most of `k` whose products are summed in integers.
pub(super) const PART: usize = 4096;

/// Calls `body` with the rows of `x`, `[m, k]`, quantised.
pub(super) fn with<R>(cpu: &Cpu, x: &[f32], k: usize, body: impl FnOnce(Digits<'_>) -> R) -> R {
    let (layout, m) = (Layout::new(k), x.len() / k);
    scratch::with(m * layout.stride, |low: &mut [i8]| {
        scratch::with(m * layout.stride, |high: &mut [i8]| {
            scratch::with(m * layout.record, |records: &mut [u32]| {
                let (low_parts, high_parts, record_parts) = (Parts::new(low), Parts::new(high), Parts::new(records));
                cpu.by_rows(m, k, |first, rows| {
                    for row in first..first + rows {
                        // SAFETY: rows are disjoint; the handle's processor has its instruction set.
                        unsafe {
                            let low = low_parts.part(row * layout.stride, layout.stride);
                            let high = high_parts.part(row * layout.stride, layout.stride);
                            let record = record_parts.part(row * layout.record, layout.record);
                            quantise(cpu.isa, &x[row * k..][..k], layout, low, high, record);
                        }
                    }
                });
                body(Digits { layout, low, high, records })
            })
        })
    })
}

kernel! {
    fn quantise = quantise_body(from: &[f32], layout: Layout, low: &mut [i8], high: &mut [i8], record: &mut [u32])
}

/// Digits and record of one row: `low` and `high` are `layout.stride` long, `record` is `layout.record`; of `high` only
/// marked blocks are written.
#[inline(always)]
unsafe fn quantise_body<S: Simd>(from: &[f32], layout: Layout, low: &mut [i8], high: &mut [i8], record: &mut [u32]) {
    let scale = scale(from);
    let factor = if scale > f32::MIN_POSITIVE { 1.0 / scale } else { 0.0 };
    record[SCALE] = scale.to_bits();
    let (offsets, marks) = record[OFFSETS..].split_at_mut(layout.parts);
    offsets.fill(0);
    if scale.is_nan() {
        low.fill(0);
        record[HIGHS] = 0;
        return;
    }
    let mut highs = 0;
    let blocks = low.chunks_exact_mut(BLOCK).zip(high.chunks_exact_mut(BLOCK));
    for (nth, (from, (low, high))) in from.chunks(BLOCK).zip(blocks).enumerate() {
        let mut values = [0.0; BLOCK];
        values[..from.len()].copy_from_slice(from);
        let mut digits = [0; BLOCK];
        let (mut sum, mut any) = (0, 0);
        for (q, x) in digits.iter_mut().zip(values) {
            *q = nearest(x * factor);
            sum += *q;
            any |= (*q + 128) >> 8;
        }
        for (low, q) in low.iter_mut().zip(digits) {
            *low = q as i8; // the low byte
        }
        let offset = &mut offsets[nth * BLOCK / layout.part];
        *offset = offset.wrapping_add((128 * sum).cast_unsigned());
        if any != 0 {
            for (high, q) in high.iter_mut().zip(digits) {
                *high = ((q + 128) >> 8) as i8;
            }
            marks[highs] = nth as u32;
            highs += 1;
        }
    }
    record[HIGHS] = highs as u32;
}

/// The step of a row; NaN where a value is not finite.
#[inline(always)]
fn scale(row: &[f32]) -> f32 {
    let (mut largest, mut squares) = ([0f32; 16], [0f32; 16]);
    let mut add = |values: &[f32; 16]| {
        for lane in 0..16 {
            largest[lane] = largest[lane].max(values[lane].abs());
            squares[lane] += values[lane] * values[lane];
        }
    };
    let (whole, rest) = row.as_chunks();
    whole.iter().for_each(&mut add);
    let mut last = [0.0; 16];
    last[..rest.len()].copy_from_slice(rest);
    add(&last);
    let largest = largest.into_iter().fold(0.0, f32::max);
    let squares: f32 = squares.into_iter().sum();
    if squares.is_nan() || largest.is_infinite() {
        return f32::NAN;
    }
    // at least what it is where one value makes up the row, should squares be too small to be told from zero
    let count = row.len() as f32;
    let rms = (squares / count).sqrt().max(largest / count.sqrt());
    largest.min(SPREAD * rms) / 127.0
}

/// The nearest integer, ties to even, of what is not NaN.
#[inline(always)]
fn nearest(x: f32) -> i32 {
    /// Floats from here on to twice of it are one apart.
    const ONES: f32 = 12_582_912.0; // 1.5 * 2^23
    (x.clamp(-LARGEST, LARGEST) + ONES).to_bits().cast_signed() - ONES.to_bits().cast_signed()
}

/// Quantised rows.
#[derive(Clone, Copy)]
pub(super) struct Digits<'a> {
    pub(super) layout: Layout,
    /// `[rows, layout.stride]`
    pub(super) low: &'a [i8],
    /// `[rows, layout.stride]`
    pub(super) high: &'a [i8],
    /// `[rows, layout.record]`
    pub(super) records: &'a [u32],
}

impl Digits<'_> {
    /// Whether no rows were quantised.
    pub(super) fn is_empty(&self) -> bool {
        self.low.is_empty()
    }

    /// The rows from this one on.
    pub(super) fn skip(self, rows: usize) -> Self {
        let Layout { stride, record, .. } = self.layout;
        Self {
            low: &self.low[rows * stride..],
            high: &self.high[rows * stride..],
            records: &self.records[rows * record..],
            ..self
        }
    }
}
