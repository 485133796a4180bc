//! Arm NEON: four lanes.

use super::Simd;
use half::{bf16, f16};
#[allow(clippy::wildcard_imports, reason = "intrinsics")]
use std::arch::aarch64::*;

#[derive(Clone, Copy)]
pub(crate) struct Neon;

/// The first `n < 4` values, the rest zero, without touching memory behind them.
#[inline(always)]
unsafe fn copy_n<T: Copy + Default>(from: *const T, n: usize) -> [T; 4] {
    let mut values = [T::default(); 4];
    // SAFETY: the caller's promise of `n` readable values; `n < 4`.
    unsafe { std::ptr::copy_nonoverlapping(from, values.as_mut_ptr(), n) };
    values
}

// SAFETY: NEON is part of every 64-bit Arm target; the trait's contract grants valid pointers.
unsafe impl Simd for Neon {
    const LANES: usize = 4;
    const TILE_ROWS: usize = 5;
    type V = float32x4_t;

    #[inline(always)]
    unsafe fn splat(value: f32) -> float32x4_t {
        unsafe { vdupq_n_f32(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> float32x4_t {
        unsafe { vld1q_f32(from) }
    }
    #[inline(always)]
    unsafe fn load_n(from: *const f32, n: usize) -> float32x4_t {
        unsafe { vld1q_f32(copy_n(from, n).as_ptr()) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: float32x4_t) {
        unsafe { vst1q_f32(to, v) }
    }
    #[inline(always)]
    unsafe fn store_n(to: *mut f32, n: usize, v: float32x4_t) {
        let mut values = [0.0; 4];
        unsafe {
            vst1q_f32(values.as_mut_ptr(), v);
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, n);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> float32x4_t {
        unsafe { vreinterpretq_f32_u32(vshll_n_u16::<16>(vld1_u16(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_bf16_n(from: *const bf16, n: usize) -> float32x4_t {
        unsafe { Self::load_bf16(copy_n(from, n).as_ptr()) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> float32x4_t {
        // By integers: the widening instruction's intrinsic is not stable. Subnormals are scaled into place by the product.
        unsafe {
            let bits = vmovl_u16(vld1_u16(from.cast()));
            let sign = vshlq_n_u32::<16>(vandq_u32(bits, vdupq_n_u32(0x8000)));
            let rest = vandq_u32(bits, vdupq_n_u32(0x7fff));
            let scaled =
                vmulq_f32(vreinterpretq_f32_u32(vshlq_n_u32::<13>(rest)), vdupq_n_f32(f32::from_bits(0x7780_0000)));
            let special = vcgeq_u32(rest, vdupq_n_u32(0x7c00));
            let infinite = vorrq_u32(vshlq_n_u32::<13>(rest), vdupq_n_u32(0x7f80_0000));
            let magnitude = vbslq_u32(special, infinite, vreinterpretq_u32_f32(scaled));
            vreinterpretq_f32_u32(vorrq_u32(magnitude, sign))
        }
    }
    #[inline(always)]
    unsafe fn load_f16_n(from: *const f16, n: usize) -> float32x4_t {
        unsafe { Self::load_f16(copy_n(from, n).as_ptr()) }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> float32x4_t {
        unsafe { Self::load_i8_n(from, 4) }
    }
    #[inline(always)]
    unsafe fn load_i8_n(from: *const i8, n: usize) -> float32x4_t {
        let mut values = [0i32; 4];
        for (lane, value) in values.iter_mut().enumerate().take(n) {
            *value = i32::from(unsafe { *from.add(lane) });
        }
        unsafe { vcvtq_f32_s32(vld1q_s32(values.as_ptr())) }
    }

    #[inline(always)]
    unsafe fn add(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vaddq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vsubq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vmulq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vdivq_f32(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: float32x4_t, b: float32x4_t, c: float32x4_t) -> float32x4_t {
        unsafe { vfmaq_f32(c, a, b) }
    }
    #[inline(always)]
    unsafe fn max(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vcgtq_f32(a, b), a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vcltq_f32(a, b), a, b) }
    }
    #[inline(always)]
    unsafe fn round(a: float32x4_t) -> float32x4_t {
        unsafe { vrndnq_f32(a) }
    }
    #[inline(always)]
    unsafe fn pow2(a: float32x4_t) -> float32x4_t {
        unsafe { vreinterpretq_f32_s32(vshlq_n_s32::<23>(vaddq_s32(vcvtq_s32_f32(a), vdupq_n_s32(127)))) }
    }
    #[inline(always)]
    unsafe fn zero_below(a: float32x4_t, least: float32x4_t, value: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(vcltq_f32(a, least), vdupq_n_f32(0.0), value) }
    }

    #[inline(always)]
    unsafe fn sum4(v: [float32x4_t; 4]) -> [f32; 4] {
        let mut out = [0.0; 4];
        unsafe {
            let sums = vpaddq_f32(vpaddq_f32(v[0], v[1]), vpaddq_f32(v[2], v[3]));
            vst1q_f32(out.as_mut_ptr(), sums);
        }
        out
    }
    #[inline(always)]
    unsafe fn prefetch<T>(at: *const T) {
        unsafe { std::arch::asm!("prfm pldl1keep, [{0}]", in(reg) at, options(nostack, preserves_flags, readonly)) }
    }
    #[inline(always)]
    unsafe fn max_lane(a: float32x4_t) -> f32 {
        unsafe { vmaxvq_f32(a) }
    }

    const BYTES: usize = 16;
    type Bytes = int8x16_t;
    type I = int32x4_t;
    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> int8x16_t {
        unsafe { vld1q_s8(from) }
    }
    #[inline(always)]
    unsafe fn load_bytes_n(from: *const i8, n: usize) -> int8x16_t {
        let mut bytes = [0; 16];
        unsafe {
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), n);
            Self::load_bytes(bytes.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn zero_i32() -> int32x4_t {
        unsafe { vdupq_n_s32(0) }
    }
    #[inline(always)]
    unsafe fn dot_bytes(sums: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        unsafe {
            let low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
            vpadalq_s16(vpadalq_s16(sums, low), vmull_high_s8(a, b))
        }
    }
    #[inline(always)]
    unsafe fn add_i32(a: int32x4_t, b: int32x4_t) -> int32x4_t {
        unsafe { vaddq_s32(a, b) }
    }
    #[inline(always)]
    unsafe fn times_256(sums: int32x4_t) -> int32x4_t {
        unsafe { vshlq_n_s32::<8>(sums) }
    }
    #[inline(always)]
    unsafe fn sum4_i32(v: [int32x4_t; 4]) -> [i32; 4] {
        let mut out = [0; 4];
        unsafe {
            let sums = vpaddq_s32(vpaddq_s32(v[0], v[1]), vpaddq_s32(v[2], v[3]));
            vst1q_s32(out.as_mut_ptr(), sums);
        }
        out
    }
}
