//! AVX2 with FMA and F16C: eight lanes.

use super::{Element, Simd};
use half::{bf16, f16};
#[allow(clippy::wildcard_imports, reason = "intrinsics")]
use std::arch::x86_64::*;

#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// All ones in the first `n` lanes.
#[inline(always)]
unsafe fn mask(n: usize) -> __m256i {
    const ONES: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    debug_assert!(n <= 8);
    // SAFETY: eight lanes from `8 - n` on lie within the sixteen.
    unsafe { _mm256_loadu_si256(ONES.as_ptr().add(8 - n).cast()) }
}

/// The first `n < 8` values, the rest zero, without touching memory behind them.
#[inline(always)]
unsafe fn copy_n<T: Copy + Default>(from: *const T, n: usize) -> [T; 8] {
    let mut values = [T::default(); 8];
    // SAFETY: the caller's promise of `n` readable values; `n < 8`.
    unsafe { std::ptr::copy_nonoverlapping(from, values.as_mut_ptr(), n) };
    values
}

// SAFETY: the trait's contract grants the features that the intrinsics need, and valid pointers.
unsafe impl Simd for Avx2 {
    const LANES: usize = 8;
    const TILE_ROWS: usize = 3;
    type V = __m256;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        unsafe { _mm256_set1_ps(value) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(from) }
    }
    #[inline(always)]
    unsafe fn load_n(from: *const f32, n: usize) -> __m256 {
        unsafe { _mm256_maskload_ps(from, mask(n)) }
    }
    #[inline(always)]
    unsafe fn store(to: *mut f32, v: __m256) {
        unsafe { _mm256_storeu_ps(to, v) }
    }
    #[inline(always)]
    unsafe fn store_n(to: *mut f32, n: usize, v: __m256) {
        unsafe { _mm256_maskstore_ps(to, mask(n), v) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const bf16) -> __m256 {
        unsafe {
            let half = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(half))
        }
    }
    #[inline(always)]
    unsafe fn load_bf16_n(from: *const bf16, n: usize) -> __m256 {
        unsafe { Self::load_bf16(copy_n(from, n).as_ptr()) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const f16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_f16_n(from: *const f16, n: usize) -> __m256 {
        unsafe { Self::load_f16(copy_n(from, n).as_ptr()) }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> __m256 {
        unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_i8_n(from: *const i8, n: usize) -> __m256 {
        unsafe { Self::load_i8(copy_n(from, n).as_ptr()) }
    }

    #[inline(always)]
    unsafe fn add(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn sub(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_sub_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn div(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_div_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m256, b: __m256, c: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn max(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_max_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn min(a: __m256, b: __m256) -> __m256 {
        unsafe { _mm256_min_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn round(a: __m256) -> __m256 {
        unsafe { _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a) }
    }
    #[inline(always)]
    unsafe fn pow2(a: __m256) -> __m256 {
        unsafe {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(a), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        }
    }
    #[inline(always)]
    unsafe fn zero_below(a: __m256, least: __m256, value: __m256) -> __m256 {
        unsafe { _mm256_and_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(a, least), value) }
    }

    #[inline(always)]
    unsafe fn sum4(v: [__m256; 4]) -> [f32; 4] {
        unsafe {
            let abcd = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
            let sums = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps::<1>(abcd));
            let mut out = [0.0; 4];
            _mm_storeu_ps(out.as_mut_ptr(), sums);
            out
        }
    }
    #[inline(always)]
    unsafe fn prefetch<T>(at: *const T) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    unsafe fn look_up(table: &[i8; 16], from: *const i8, n: usize, low: *mut i8, high: *mut i8) {
        unsafe { look_up(table, from, n, low, high) }
    }
    #[inline(always)]
    unsafe fn transpose<E: Element>(
        from: *const E,
        stride: usize,
        rows: usize,
        columns: usize,
        to: *mut f32,
        to_stride: usize,
    ) {
        for row in (0..rows).step_by(8) {
            for column in (0..columns).step_by(8) {
                let (n, left) = ((rows - row).min(8), (columns - column).min(8));
                unsafe {
                    let from = from.add(row * stride + column);
                    let to = to.add(column * to_stride + row);
                    let mut v = [_mm256_setzero_ps(); 8];
                    for (r, v) in v.iter_mut().enumerate().take(n) {
                        *v = E::load_some::<Self>(from.add(r * stride), left);
                    }
                    for (c, v) in transposed(v).into_iter().enumerate().take(left) {
                        Self::store_some(to.add(c * to_stride), n, v);
                    }
                }
            }
        }
    }
    #[inline(always)]
    unsafe fn max_lane(a: __m256) -> f32 {
        unsafe {
            let a = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let a = _mm_max_ps(a, _mm_movehl_ps(a, a));
            _mm_cvtss_f32(_mm_max_ss(a, _mm_movehdup_ps(a)))
        }
    }

    const BYTES: usize = 16;
    type Bytes = __m256i;
    type I = __m256i;
    #[inline(always)]
    unsafe fn load_bytes(from: *const i8) -> __m256i {
        unsafe { _mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bytes_n(from: *const i8, n: usize) -> __m256i {
        let mut bytes = [0; 16];
        unsafe {
            std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), n);
            Self::load_bytes(bytes.as_ptr())
        }
    }
    #[inline(always)]
    unsafe fn zero_i32() -> __m256i {
        unsafe { _mm256_setzero_si256() }
    }
    #[inline(always)]
    unsafe fn dot_bytes(sums: __m256i, a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)) }
    }
    #[inline(always)]
    unsafe fn add_i32(a: __m256i, b: __m256i) -> __m256i {
        unsafe { _mm256_add_epi32(a, b) }
    }
    #[inline(always)]
    unsafe fn times_256(sums: __m256i) -> __m256i {
        unsafe { _mm256_slli_epi32::<8>(sums) }
    }
    #[inline(always)]
    unsafe fn sum4_i32(v: [__m256i; 4]) -> [i32; 4] {
        unsafe {
            let abcd = _mm256_hadd_epi32(_mm256_hadd_epi32(v[0], v[1]), _mm256_hadd_epi32(v[2], v[3]));
            let sums = _mm_add_epi32(_mm256_castsi256_si128(abcd), _mm256_extracti128_si256::<1>(abcd));
            let mut out = [0; 4];
            _mm_storeu_si128(out.as_mut_ptr().cast(), sums);
            out
        }
    }
}

/// [`Simd::look_up`], 32 or 16 bytes at a time and the rest one by one.
#[inline(always)]
pub(super) unsafe fn look_up(table: &[i8; 16], from: *const i8, n: usize, low: *mut i8, high: *mut i8) {
    // SAFETY: the caller's promise.
    unsafe {
        let (levels, nibble) = (_mm_loadu_si128(table.as_ptr().cast()), _mm256_set1_epi8(15));
        let wide = _mm256_broadcastsi128_si256(levels);
        let mut i = 0;
        while i + 32 <= n {
            let bytes = _mm256_loadu_si256(from.add(i).cast());
            let above = _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), nibble);
            _mm256_storeu_si256(low.add(i).cast(), _mm256_shuffle_epi8(wide, _mm256_and_si256(bytes, nibble)));
            _mm256_storeu_si256(high.add(i).cast(), _mm256_shuffle_epi8(wide, above));
            i += 32;
        }
        while i + 16 <= n {
            let (bytes, nibble) = (_mm_loadu_si128(from.add(i).cast()), _mm_set1_epi8(15));
            let above = _mm_and_si128(_mm_srli_epi16::<4>(bytes), nibble);
            _mm_storeu_si128(low.add(i).cast(), _mm_shuffle_epi8(levels, _mm_and_si128(bytes, nibble)));
            _mm_storeu_si128(high.add(i).cast(), _mm_shuffle_epi8(levels, above));
            i += 16;
        }
        for i in i..n {
            let byte = (*from.add(i)).cast_unsigned();
            *low.add(i) = table[usize::from(byte & 15)];
            *high.add(i) = table[usize::from(byte >> 4)];
        }
    }
}

/// Eight rows of eight to eight columns.
#[inline(always)]
unsafe fn transposed(rows: [__m256; 8]) -> [__m256; 8] {
    // SAFETY: the caller's promise.
    unsafe {
        // Half `l` of `quads[4 i + j]`: column `4 l + j` of rows `4 i .. 4 i + 4`.
        let mut quads = rows;
        for i in [0, 4] {
            let [a, b, c, d] = [rows[i], rows[i + 1], rows[i + 2], rows[i + 3]];
            let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
            quads[i] = _mm256_shuffle_ps::<0x44>(ab, cd);
            quads[i + 1] = _mm256_shuffle_ps::<0xee>(ab, cd);
            let (ab, cd) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
            quads[i + 2] = _mm256_shuffle_ps::<0x44>(ab, cd);
            quads[i + 3] = _mm256_shuffle_ps::<0xee>(ab, cd);
        }
        let mut columns = quads;
        for j in 0..4 {
            columns[j] = _mm256_permute2f128_ps::<0x20>(quads[j], quads[4 + j]);
            columns[4 + j] = _mm256_permute2f128_ps::<0x31>(quads[j], quads[4 + j]);
        }
        columns
    }
}
