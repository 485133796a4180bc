//! 8-bit weights with 8-bit activations: bytes are widened to 16 bits, and products of neighbours summed in 32.

use super::{
    Target, Tile,
    digits::Digits,
    quantised::{Bytes, Quantised},
    tile::{self, Operands},
};
use crate::{
    Int8Weights,
    simd::{Simd, kernel},
};
use std::marker::PhantomData;

kernel! {
    pub(super) fn block = block_body(
        rows: Digits<'_>, weight: Int8Weights<'_>, k: usize, tile: Tile, bias: Option<&[f32]>, to: Target,
    )
}

/// `rows` and `weight` start at the tile's first row and column.
///
/// # Safety
/// As for [`tile::multiply`].
#[inline(always)]
unsafe fn block_body<S: Simd>(
    rows: Digits<'_>,
    weight: Int8Weights<'_>,
    k: usize,
    tile: Tile,
    bias: Option<&[f32]>,
    to: Target,
) {
    // SAFETY: the caller's promise.
    unsafe { tile::multiply(operands::<Wide<S>>(rows, weight, k, bias, to), tile) };
}

pub(super) fn operands<'a, B: Bytes>(
    rows: Digits<'a>,
    weight: Int8Weights<'a>,
    k: usize,
    bias: Option<&'a [f32]>,
    to: Target,
) -> Operands<'a, Quantised<'a, B>> {
    let dot = Quantised { rows, scales: weight.scales, bytes: PhantomData };
    Operands { dot, x: rows.low.as_ptr(), stride: rows.layout.stride, w: weight.values.as_ptr(), k, bias, to }
}

/// Products of bytes by the instruction set's own means.
#[derive(Clone, Copy)]
struct Wide<S>(PhantomData<S>);

// SAFETY: passes the contract on.
unsafe impl<S: Simd> Bytes for Wide<S> {
    type V = S::Bytes;
    type Sums = S::I;
    const STEP: usize = S::BYTES;
    const ROWS: usize = S::TILE_ROWS.div_ceil(2);
    const OFFSET: bool = false;

    #[inline(always)]
    unsafe fn zero() -> S::I {
        // SAFETY: the caller's promise.
        unsafe { S::zero_i32() }
    }
    #[inline(always)]
    unsafe fn load_x(from: *const i8) -> S::Bytes {
        // SAFETY: the caller's promise.
        unsafe { S::load_bytes(from) }
    }
    #[inline(always)]
    unsafe fn load_w(from: *const i8) -> S::Bytes {
        // SAFETY: the caller's promise.
        unsafe { S::load_bytes(from) }
    }
    #[inline(always)]
    unsafe fn load_w_n(from: *const i8, n: usize) -> S::Bytes {
        // SAFETY: the caller's promise.
        unsafe { S::load_bytes_n(from, n) }
    }
    #[inline(always)]
    unsafe fn add_product(sums: S::I, x: S::Bytes, w: S::Bytes) -> S::I {
        // SAFETY: the caller's promise.
        unsafe { S::dot_bytes(sums, x, w) }
    }
    #[inline(always)]
    unsafe fn add(a: S::I, b: S::I) -> S::I {
        // SAFETY: the caller's promise.
        unsafe { S::add_i32(a, b) }
    }
    #[inline(always)]
    unsafe fn times_256(sums: S::I) -> S::I {
        // SAFETY: the caller's promise.
        unsafe { S::times_256(sums) }
    }
    #[inline(always)]
    unsafe fn sum4(sums: [S::I; 4]) -> [i32; 4] {
        // SAFETY: the caller's promise.
        unsafe { S::sum4_i32(sums) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const i8) {
        // SAFETY: the caller's promise.
        unsafe { S::prefetch(at) }
    }
}
