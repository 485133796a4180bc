//! Exact integer products of quantised activations with 8-bit weights.
//!
//! Sums are integers, so a result's bits do not depend on the instruction set. They are exact although they may wrap
//! on the way: with `q = low + 256 * high`, `|sum q w| <= 127 sqrt(k) |q| <= 127 k 127 / 6`, below `2^31` up to `k` = 798,000.

use super::{
    digits::{BLOCK, Digits, HIGHS, OFFSETS, PART, SCALE},
    tile::{Dot, Place},
};
use std::marker::PhantomData;

/// How an instruction set multiplies bytes.
///
/// # Safety
/// As for [`Dot`].
pub(super) unsafe trait Bytes: Copy {
    type V: Copy;
    type Sums: Copy;
    /// Bytes of `k` in a vector; a divisor of 64.
    const STEP: usize;
    const ROWS: usize;
    /// Whether weights are multiplied with 128 added to them.
    const OFFSET: bool;

    unsafe fn zero() -> Self::Sums;
    unsafe fn load_x(from: *const i8) -> Self::V;
    unsafe fn load_w(from: *const i8) -> Self::V;
    /// The first `n < STEP` bytes; the others meet zeros, and their memory is not touched.
    unsafe fn load_w_n(from: *const i8, n: usize) -> Self::V;
    unsafe fn add_product(sums: Self::Sums, x: Self::V, w: Self::V) -> Self::Sums;
    unsafe fn add(a: Self::Sums, b: Self::Sums) -> Self::Sums;
    unsafe fn times_256(sums: Self::Sums) -> Self::Sums;
    unsafe fn sum4(sums: [Self::Sums; 4]) -> [i32; 4];
    unsafe fn prefetch(at: *const i8);
}

/// Quantised activations with weights of one scale a row.
#[derive(Clone, Copy)]
pub(super) struct Quantised<'a, B> {
    /// From the tile's first row on.
    pub(super) rows: Digits<'a>,
    /// From the tile's first column on.
    pub(super) scales: &'a [f32],
    pub(super) bytes: PhantomData<B>,
}

// SAFETY: passes the contract on.
unsafe impl<B: Bytes> Dot for Quantised<'_, B> {
    type X = i8;
    type W = i8;
    type V = B::V;
    type Sums = B::Sums;
    /// Sums of the row's `high`, 256 times; unspecified where it has none.
    type Start = [B::Sums; 4];
    const STEP: usize = B::STEP;
    const ROWS: usize = B::ROWS;
    const BLOCK: usize = PART;

    #[inline(always)]
    unsafe fn zero() -> B::Sums {
        // SAFETY: the caller's promise.
        unsafe { B::zero() }
    }
    #[inline(always)]
    unsafe fn start(self, place: Place<i8>) -> [B::Sums; 4] {
        // SAFETY: the caller's promise; records are as `quantise` made them.
        unsafe {
            let record = self.record(place.row);
            let count = *record.add(HIGHS) as usize;
            if count == 0 {
                return [B::zero(); 4];
            }
            let marks = std::slice::from_raw_parts(record.add(OFFSETS + self.rows.layout.parts), count);
            self.high(marks, place)
        }
    }
    #[inline(always)]
    unsafe fn load_x(from: *const i8) -> B::V {
        // SAFETY: the caller's promise.
        unsafe { B::load_x(from) }
    }
    /// Zeros follow the values.
    #[inline(always)]
    unsafe fn load_x_n(from: *const i8, _: usize) -> B::V {
        // SAFETY: the caller's promise.
        unsafe { B::load_x(from) }
    }
    #[inline(always)]
    unsafe fn load_w(from: *const i8) -> B::V {
        // SAFETY: the caller's promise.
        unsafe { B::load_w(from) }
    }
    #[inline(always)]
    unsafe fn load_w_n(from: *const i8, n: usize) -> B::V {
        // SAFETY: the caller's promise.
        unsafe { B::load_w_n(from, n) }
    }
    #[inline(always)]
    unsafe fn add_product(sums: B::Sums, x: B::V, w: B::V) -> B::Sums {
        // SAFETY: the caller's promise.
        unsafe { B::add_product(sums, x, w) }
    }
    #[inline(always)]
    unsafe fn finish(self, place: Place<i8>, start: [B::Sums; 4], mut sums: [B::Sums; 4]) -> [f32; 4] {
        // SAFETY: the caller's promise; records are as `quantise` made them.
        unsafe {
            let record = self.record(place.row);
            if *record.add(HIGHS) > 0 {
                for c in 0..4 {
                    sums[c] = B::add(sums[c], start[c]);
                }
            }
            let offset = if B::OFFSET { (*record.add(OFFSETS + place.nth)).cast_signed() } else { 0 };
            let scale = f32::from_bits(*record.add(SCALE));
            let scales = match place.w_stride {
                0 => [*self.scales.get_unchecked(place.column); 4],
                _ => *self.scales.as_ptr().add(place.column).cast::<[f32; 4]>(),
            };
            let sums = B::sum4(sums);
            let mut out = [0.0; 4];
            for c in 0..4 {
                out[c] = sums[c].wrapping_sub(offset) as f32 * (scale * scales[c]);
            }
            out
        }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const i8) {
        // SAFETY: the caller's promise.
        unsafe { B::prefetch(at) }
    }
}

impl<B: Bytes> Quantised<'_, B> {
    /// The record of a row.
    ///
    /// # Safety
    /// There is such a row.
    #[inline(always)]
    unsafe fn record(&self, row: usize) -> *const u32 {
        // SAFETY: the caller's promise.
        unsafe { self.rows.records.as_ptr().add(row * self.rows.layout.record) }
    }

    /// Sums of the products of the row's `high`, 256 times, from the blocks of `place` that are marked.
    ///
    /// # Safety
    /// As for [`Dot::start`].
    #[inline(always)]
    unsafe fn high(self, marks: &[u32], place: Place<i8>) -> [B::Sums; 4] {
        // SAFETY: the caller's promise; marked blocks lie within the row.
        unsafe {
            let mut sums = [B::zero(); 4];
            let x = self.rows.high.as_ptr().add(place.row * self.rows.layout.stride + place.start);
            for mark in marks {
                let at = (*mark as usize * BLOCK).wrapping_sub(place.start);
                if at >= place.len {
                    continue; // of another part
                }
                let (x, w) = (x.add(at), place.w.add(at));
                let len = place.len - at;
                for i in (0..BLOCK).step_by(B::STEP) {
                    let x = B::load_x(x.add(i));
                    if i + B::STEP <= len {
                        for c in 0..4 {
                            sums[c] = B::add_product(sums[c], x, B::load_w(w.add(c * place.w_stride + i)));
                        }
                    } else if i < len {
                        for c in 0..4 {
                            let w = B::load_w_n(w.add(c * place.w_stride + i), len - i);
                            sums[c] = B::add_product(sums[c], x, w);
                        }
                    }
                }
            }
            for sum in &mut sums {
                *sum = B::times_256(*sum);
            }
            sums
        }
    }
}
