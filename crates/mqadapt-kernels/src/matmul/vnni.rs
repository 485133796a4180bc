//! 8-bit weights with 8-bit activations by `vpdpbusd`: four products a lane and instruction, summed in 32 bits.

use super::{Target, Tile, digits::Digits, int8, quantised::Bytes, tile};
use crate::{
    Int8Weights,
    simd::{Simd, avx512::Avx512},
};
use std::arch::x86_64::{
    __m512i, _mm512_dpbusd_epi32, _mm512_loadu_si512, _mm512_maskz_loadu_epi8, _mm512_set1_epi8, _mm512_setzero_si512,
    _mm512_xor_si512,
};

/// `rows` and `weight` start at the tile's first row and column.
///
/// # Safety
/// The processor has AVX-512 VNNI; besides as for [`tile::multiply`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
pub(super) unsafe fn block(
    rows: Digits<'_>,
    weight: Int8Weights<'_>,
    k: usize,
    tile: Tile,
    bias: Option<&[f32]>,
    to: Target,
) {
    // SAFETY: the caller's promise.
    unsafe { tile::multiply(int8::operands::<Fours>(rows, weight, k, bias, to), tile) };
}

/// The instruction takes one side without a sign: weights get 128 added, by their highest bit.
#[derive(Clone, Copy)]
struct Fours;

// SAFETY: `block` has the features.
unsafe impl Bytes for Fours {
    type V = __m512i;
    type Sums = __m512i;
    const STEP: usize = 64;
    const ROWS: usize = 6;
    const OFFSET: bool = true;

    #[inline(always)]
    unsafe fn zero() -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_setzero_si512() }
    }
    #[inline(always)]
    unsafe fn load_x(from: *const i8) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }
    #[inline(always)]
    unsafe fn load_w(from: *const i8) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_xor_si512(_mm512_loadu_si512(from.cast()), _mm512_set1_epi8(-128)) }
    }
    #[inline(always)]
    unsafe fn load_w_n(from: *const i8, n: usize) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_xor_si512(_mm512_maskz_loadu_epi8((1 << n) - 1, from), _mm512_set1_epi8(-128)) }
    }
    #[inline(always)]
    unsafe fn add_product(sums: __m512i, x: __m512i, w: __m512i) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { _mm512_dpbusd_epi32(sums, w, x) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { Avx512::add_i32(a, b) }
    }
    #[inline(always)]
    unsafe fn times_256(sums: __m512i) -> __m512i {
        // SAFETY: the caller's promise.
        unsafe { Avx512::times_256(sums) }
    }
    #[inline(always)]
    unsafe fn sum4(sums: [__m512i; 4]) -> [i32; 4] {
        // SAFETY: the caller's promise.
        unsafe { Avx512::sum4_i32(sums) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const i8) {
        // SAFETY: the caller's promise.
        unsafe { Avx512::prefetch(at) }
    }
}
