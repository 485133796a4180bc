//! Vectors of `f32`, one implementation per instruction set, and the kernels' dispatch.
//!
//! Kernels are written once, generic over [`Simd`] and `inline(always)`; [`kernel!`] compiles them once per
//! instruction set, inside a function that has the set's target features, and picks one at run time.

use half::{bf16, f16};

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod scalar;

/// One instruction set's vector of `f32`.
///
/// # Safety
/// Every method may run only where the instruction set exists, inside a function compiled with its target
/// features. Pointers must be valid for the lanes that the method names; they need no alignment.
pub(crate) unsafe trait Simd: Copy + 'static {
    /// `f32` values in a vector.
    const LANES: usize;
    /// Rows of activations in a matmul tile of four columns, as the registers allow.
    const TILE_ROWS: usize;
    type V: Copy;

    unsafe fn splat(value: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    /// The first `n < LANES` lanes; the others are zero and their memory is not touched.
    unsafe fn load_n(from: *const f32, n: usize) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    /// Stores the first `n < LANES` lanes only.
    unsafe fn store_n(to: *mut f32, n: usize, v: Self::V);
    unsafe fn load_bf16(from: *const bf16) -> Self::V;
    unsafe fn load_bf16_n(from: *const bf16, n: usize) -> Self::V;
    unsafe fn load_f16(from: *const f16) -> Self::V;
    unsafe fn load_f16_n(from: *const f16, n: usize) -> Self::V;
    /// Sixteen-bit and eight-bit loads widen exactly.
    unsafe fn load_i8(from: *const i8) -> Self::V;
    unsafe fn load_i8_n(from: *const i8, n: usize) -> Self::V;

    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once where the processor does so; the scalar tier rounds twice.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger one; `b` where either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller one; `b` where either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// Nearest integer, ties to even.
    unsafe fn round(a: Self::V) -> Self::V;
    /// `2^a` for integral `a` in `-126..=127`.
    unsafe fn pow2(a: Self::V) -> Self::V;
    /// `value` where `a >= least` or `a` is NaN, zero elsewhere.
    unsafe fn zero_below(a: Self::V, least: Self::V, value: Self::V) -> Self::V;

    /// The four sums over lanes; every one adds its lanes in the same fixed order.
    unsafe fn sum4(v: [Self::V; 4]) -> [f32; 4];
    /// The largest lane (unspecified if one is NaN).
    unsafe fn max_lane(a: Self::V) -> f32;

    /// Bytes in a vector of them, and that vector in the form that products take; a divisor of 64.
    const BYTES: usize;
    type Bytes: Copy;
    /// A vector of `i32`.
    type I: Copy;
    unsafe fn load_bytes(from: *const i8) -> Self::Bytes;
    /// The first `n < BYTES`; the others are zero and their memory is not touched.
    unsafe fn load_bytes_n(from: *const i8, n: usize) -> Self::Bytes;
    unsafe fn zero_i32() -> Self::I;
    /// Adds the products of all bytes to the lanes of `sums`, which may wrap.
    unsafe fn dot_bytes(sums: Self::I, a: Self::Bytes, b: Self::Bytes) -> Self::I;
    unsafe fn add_i32(a: Self::I, b: Self::I) -> Self::I;
    unsafe fn times_256(sums: Self::I) -> Self::I;
    /// The four sums over lanes, which may wrap.
    unsafe fn sum4_i32(v: [Self::I; 4]) -> [i32; 4];

    /// Transposes `from`, `rows` rows of `columns` values `stride` apart, into `to`, rows `to_stride` apart, as `f32`.
    ///
    /// Writes `rows` values in each of `columns` rows, nothing else.
    #[inline(always)]
    unsafe fn transpose<E: Element>(
        from: *const E,
        stride: usize,
        rows: usize,
        columns: usize,
        to: *mut f32,
        to_stride: usize,
    ) {
        for row in 0..rows {
            // SAFETY: the caller's promise.
            unsafe {
                let mut column = 0;
                while column < columns {
                    let mut values = [0.0; 16];
                    let left = (columns - column).min(Self::LANES);
                    Self::store(values.as_mut_ptr(), E::load_some::<Self>(from.add(row * stride + column), left));
                    for (offset, value) in values.iter().enumerate().take(left) {
                        *to.add((column + offset) * to_stride + row) = *value;
                    }
                    column += Self::LANES;
                }
            }
        }
    }

    /// Looks the halves of `n` bytes up in `table`: the low half of byte `i` gives `low[i]`, the high one `high[i]`. Writes
    /// `n` values to each, nothing else.
    #[inline(always)]
    unsafe fn look_up(table: &[i8; 16], from: *const i8, n: usize, low: *mut i8, high: *mut i8) {
        for i in 0..n {
            // SAFETY: the caller's promise.
            unsafe {
                let byte = (*from.add(i)).cast_unsigned();
                *low.add(i) = table[usize::from(byte & 15)];
                *high.add(i) = table[usize::from(byte >> 4)];
            }
        }
    }

    /// Asks for the cache line at `at`, which may be any address.
    #[inline(always)]
    unsafe fn prefetch<T>(_at: *const T) {}

    #[inline(always)]
    unsafe fn zero() -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { Self::splat(0.0) }
    }

    /// All lanes or, where fewer values are `left`, that many.
    #[inline(always)]
    unsafe fn load_some(from: *const f32, left: usize) -> Self::V {
        // SAFETY: the caller's promise.
        unsafe { if left >= Self::LANES { Self::load(from) } else { Self::load_n(from, left) } }
    }

    /// All lanes or, where room for fewer is `left`, that many.
    #[inline(always)]
    unsafe fn store_some(to: *mut f32, left: usize, v: Self::V) {
        // SAFETY: the caller's promise.
        unsafe { if left >= Self::LANES { Self::store(to, v) } else { Self::store_n(to, left, v) } }
    }

    /// Sum over lanes, in the order of [`Simd::sum4`].
    #[inline(always)]
    unsafe fn sum(a: Self::V) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { Self::sum4([a, Self::zero(), Self::zero(), Self::zero()])[0] }
    }

    /// `e^a` within 2 units in the last place; zero below -87.3, that of 88 above it, NaN for NaN.
    #[inline(always)]
    unsafe fn exp(a: Self::V) -> Self::V {
        // e^a = 2^n e^r, |r| <= ln(2) / 2; the polynomial is Cephes' expf.
        // SAFETY: the caller's promise.
        unsafe {
            let least = Self::splat(-87.336_54);
            let x = Self::min(Self::splat(88.0), Self::max(least, a));
            let n = Self::round(Self::mul(x, Self::splat(std::f32::consts::LOG2_E)));
            let r = Self::fma(n, Self::splat(-0.693_359_4), x);
            let r = Self::fma(n, Self::splat(2.121_944_4e-4), r);
            let mut p = Self::splat(1.987_569_1e-4);
            for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
                p = Self::fma(p, r, Self::splat(c));
            }
            let p = Self::add(Self::fma(p, Self::mul(r, r), r), Self::splat(1.0));
            Self::zero_below(a, least, Self::mul(p, Self::pow2(n)))
        }
    }
}

/// A stored number that loads as `f32`.
///
/// # Safety
/// As for [`Simd`].
pub(crate) unsafe trait Element: Copy + Send + Sync + 'static {
    unsafe fn load<S: Simd>(from: *const Self) -> S::V;
    unsafe fn load_n<S: Simd>(from: *const Self, n: usize) -> S::V;

    /// All lanes or, where fewer values are `left`, that many.
    #[inline(always)]
    unsafe fn load_some<S: Simd>(from: *const Self, left: usize) -> S::V {
        // SAFETY: the caller's promise.
        unsafe { if left >= S::LANES { Self::load::<S>(from) } else { Self::load_n::<S>(from, left) } }
    }
}

macro_rules! element {
    ($type:ty, $load:ident, $load_n:ident) => {
        // SAFETY: passes the contract on.
        unsafe impl Element for $type {
            #[inline(always)]
            unsafe fn load<S: Simd>(from: *const Self) -> S::V {
                // SAFETY: the caller's promise.
                unsafe { S::$load(from) }
            }
            #[inline(always)]
            unsafe fn load_n<S: Simd>(from: *const Self, n: usize) -> S::V {
                // SAFETY: the caller's promise.
                unsafe { S::$load_n(from, n) }
            }
        }
    };
}
element!(f32, load, load_n);
element!(bf16, load_bf16, load_bf16_n);
element!(f16, load_f16, load_f16_n);
element!(i8, load_i8, load_i8_n);

/// Defines `unsafe fn name(isa, args)`, which runs `body::<S>(args)` on the instruction set `isa`.
macro_rules! kernel {
    ($vis:vis fn $name:ident $(<$g:ident: $bound:ident>)? = $body:ident ($($arg:ident: $type:ty),* $(,)?) $(-> $ret:ty)?) => {
        /// # Safety
        /// The processor has `isa`, and the body's own contract holds.
        #[allow(clippy::too_many_arguments)]
        $vis unsafe fn $name $(<$g: $bound>)? (isa: $crate::Isa, $($arg: $type),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn avx2 $(<$g: $bound>)? ($($arg: $type),*) $(-> $ret)? {
                // SAFETY: the caller's promise.
                unsafe { $body::<$crate::simd::avx2::Avx2 $(, $g)?>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")]
            unsafe fn avx512 $(<$g: $bound>)? ($($arg: $type),*) $(-> $ret)? {
                // SAFETY: the caller's promise.
                unsafe { $body::<$crate::simd::avx512::Avx512 $(, $g)?>($($arg),*) }
            }
            // SAFETY: the caller's promise.
            unsafe {
                match isa {
                    #[cfg(target_arch = "x86_64")]
                    $crate::Isa::Avx2 => avx2 $(::<$g>)? ($($arg),*),
                    #[cfg(target_arch = "x86_64")]
                    $crate::Isa::Avx512 | $crate::Isa::Avx512Bf16 => avx512 $(::<$g>)? ($($arg),*),
                    #[cfg(target_arch = "aarch64")]
                    $crate::Isa::Neon => $body::<$crate::simd::neon::Neon $(, $g)?>($($arg),*),
                    _ => $body::<$crate::simd::scalar::Scalar $(, $g)?>($($arg),*),
                }
            }
        }
    };
}
pub(crate) use kernel;
