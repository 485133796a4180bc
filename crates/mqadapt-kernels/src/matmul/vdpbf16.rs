//! `bf16` activations with `bf16` weights by `vdpbf16ps`: exact products of pairs, `f32` sums.

use super::{
    Target, Tile,
    tile::{self, Dot, Operands, Place},
};
use crate::simd::{Simd, avx512::Avx512};
use half::bf16;
use std::arch::x86_64::{
    __m512, __m512bh, _mm512_dpbf16_ps, _mm512_loadu_si512, _mm512_maskz_loadu_epi16, _mm512_setzero_ps,
};

/// `x` and `weight` point at the tile's first row and column; rows of `x` are `stride` apart and padded with zeros.
///
/// # Safety
/// The processor has AVX-512 BF16; besides as for [`tile::multiply`], with `stride` a multiple of 32.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
pub(super) unsafe fn block(
    x: *const bf16,
    stride: usize,
    weight: *const bf16,
    k: usize,
    tile: Tile,
    bias: Option<&[f32]>,
    to: Target,
) {
    // SAFETY: the caller's promise.
    unsafe { tile::multiply(Operands { dot: Pairs, x, stride, w: weight, k, bias, to }, tile) };
}

/// Products of pairs of `bf16`.
#[derive(Clone, Copy)]
struct Pairs;

// SAFETY: `block` has the features.
unsafe impl Dot for Pairs {
    type X = bf16;
    type W = bf16;
    type V = __m512bh;
    type Sums = __m512;
    type Start = ();
    const STEP: usize = 32;
    const ROWS: usize = 6;
    const BLOCK: usize = 1280;

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_setzero_ps() }
    }
    #[inline(always)]
    unsafe fn start(self, _: Place<bf16>) {}
    #[inline(always)]
    unsafe fn load_x(from: *const bf16) -> __m512bh {
        // SAFETY: the caller's promise; two views of 512 bits.
        unsafe { std::mem::transmute(_mm512_loadu_si512(from.cast())) }
    }
    /// Padding follows the values.
    #[inline(always)]
    unsafe fn load_x_n(from: *const bf16, _: usize) -> __m512bh {
        // SAFETY: the caller's promise.
        unsafe { Self::load_x(from) }
    }
    #[inline(always)]
    unsafe fn load_w(from: *const bf16) -> __m512bh {
        // SAFETY: the caller's promise.
        unsafe { Self::load_x(from) }
    }
    #[inline(always)]
    unsafe fn load_w_n(from: *const bf16, n: usize) -> __m512bh {
        // SAFETY: the caller's promise; two views of 512 bits.
        unsafe { std::mem::transmute(_mm512_maskz_loadu_epi16((1 << n) - 1, from.cast())) }
    }
    #[inline(always)]
    unsafe fn add_product(sums: __m512, x: __m512bh, w: __m512bh) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe { _mm512_dpbf16_ps(sums, x, w) }
    }
    #[inline(always)]
    unsafe fn finish(self, _: Place<bf16>, (): (), sums: [__m512; 4]) -> [f32; 4] {
        // SAFETY: the caller's promise.
        unsafe { Avx512::sum4(sums) }
    }
    #[inline(always)]
    unsafe fn prefetch(at: *const bf16) {
        // SAFETY: the caller's promise.
        unsafe { Avx512::prefetch(at) }
    }
}
