//! One lane, in portable Rust: the twin that the other instruction sets are tested against.

use super::Simd;
use half::{bf16, f16};

#[derive(Clone, Copy)]
pub(crate) struct Scalar;

// SAFETY: portable code.
unsafe impl Simd for Scalar {
    const LANES: usize = 1;
    const TILE_ROWS: usize = 2;
    type V = f32;

    #[inline(always)]
    unsafe fn splat(value: f32) -> f32 {
        value
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { *from }
    }
    #[inline(always)]
    unsafe fn load_n(_: *const f32, _: usize) -> f32 {
        0.0
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: f32) {
        // SAFETY: the caller's promise.
        unsafe { *to = v }
    }
    #[inline(always)]
    unsafe fn store_n(_: *mut f32, _: usize, _: f32) {}
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> f32 {
        // SAFETY: the caller's promise.
        f32::from_bits(u32::from(unsafe { *from }.to_bits()) << 16)
    }
    #[inline(always)]
    unsafe fn load_bf16_n(_: *const bf16, _: usize) -> f32 {
        0.0
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { *from }.to_f32_const()
    }
    #[inline(always)]
    unsafe fn load_f16_n(_: *const f16, _: usize) -> f32 {
        0.0
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> f32 {
        // SAFETY: the caller's promise.
        f32::from(unsafe { *from })
    }
    #[inline(always)]
    unsafe fn load_i8_n(_: *const i8, _: usize) -> f32 {
        0.0
    }

    #[inline(always)]
    unsafe fn add(a: f32, b: f32) -> f32 {
        a + b
    }
    #[inline(always)]
    unsafe fn sub(a: f32, b: f32) -> f32 {
        a - b
    }
    #[inline(always)]
    unsafe fn mul(a: f32, b: f32) -> f32 {
        a * b
    }
    #[inline(always)]
    unsafe fn div(a: f32, b: f32) -> f32 {
        a / b
    }
    /// Rounds twice: without the instruction, a true fused operation is a slow library call.
    #[inline(always)]
    unsafe fn fma(a: f32, b: f32, c: f32) -> f32 {
        a * b + c
    }
    #[inline(always)]
    unsafe fn max(a: f32, b: f32) -> f32 {
        if a > b { a } else { b }
    }
    #[inline(always)]
    unsafe fn min(a: f32, b: f32) -> f32 {
        if a < b { a } else { b }
    }
    #[inline(always)]
    unsafe fn round(a: f32) -> f32 {
        a.round_ties_even()
    }
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // -126..=127 by contract
    unsafe fn pow2(a: f32) -> f32 {
        f32::from_bits(((a as i32 + 127) as u32) << 23)
    }
    #[inline(always)]
    unsafe fn zero_below(a: f32, least: f32, value: f32) -> f32 {
        if a < least { 0.0 } else { value }
    }
    #[inline(always)]
    unsafe fn sum4(v: [f32; 4]) -> [f32; 4] {
        v
    }
    #[inline(always)]
    unsafe fn max_lane(a: f32) -> f32 {
        a
    }

    const BYTES: usize = 1;
    type Bytes = i32;
    type I = i32;
    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> i32 {
        // SAFETY: the caller's promise.
        i32::from(unsafe { *from })
    }
    #[inline(always)]
    unsafe fn load_bytes_n(_: *const i8, _: usize) -> i32 {
        0
    }
    #[inline(always)]
    unsafe fn zero_i32() -> i32 {
        0
    }
    #[inline(always)]
    unsafe fn dot_bytes(sums: i32, a: i32, b: i32) -> i32 {
        sums.wrapping_add(a * b)
    }
    #[inline(always)]
    unsafe fn add_i32(a: i32, b: i32) -> i32 {
        a.wrapping_add(b)
    }
    #[inline(always)]
    unsafe fn times_256(sums: i32) -> i32 {
        sums << 8
    }
    #[inline(always)]
    unsafe fn sum4_i32(v: [i32; 4]) -> [i32; 4] {
        v
    }
}
