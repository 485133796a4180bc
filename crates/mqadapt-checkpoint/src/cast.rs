//! Conversion between the float types, on little-endian bytes, with exact rounding (ties to even, NaN stays NaN), at the
//! speed of memory: values go through a block of f32 in the first-level cache, by vector instructions where there are any.

use half::{bf16, f16};
use mqadapt_core::DType;

use crate::StoredType;

/// Values of a block.
const BLOCK: usize = 1024;

/// Converts values; returns how many finite ones became infinite. Both slices hold the same number of values; a rest that
/// is not a whole value is left alone.
pub fn convert(from: DType, source: &[u8], to: DType, out: &mut [u8]) -> u64 {
    if from == to {
        let len = source.len().min(out.len());
        out[..len].copy_from_slice(&source[..len]);
        return 0;
    }
    let mut overflowed = 0;
    let mut block = [0.0; BLOCK];
    for (source, out) in source.chunks(BLOCK * from.bytes()).zip(out.chunks_mut(BLOCK * to.bytes())) {
        let count = (source.len() / from.bytes()).min(out.len() / to.bytes());
        let values = &mut block[..count];
        widen(from, source, values);
        overflowed += narrow(to, values, out);
    }
    overflowed
}

/// Rounds values in place to what a dtype can hold, and puts them into `out` as they are stored. Returns how many finite
/// ones became infinite. `out` has `values.len() * dtype.bytes()` bytes.
pub fn round(values: &mut [f32], dtype: DType, out: &mut [u8]) -> u64 {
    let mut overflowed = 0;
    for (values, out) in values.chunks_mut(BLOCK).zip(out.chunks_mut(BLOCK * dtype.bytes())) {
        overflowed += narrow(dtype, values, out);
        widen(dtype, out, values);
    }
    overflowed
}

/// [`convert`] from any type of floats; of another type, nothing.
pub fn convert_stored(from: StoredType, source: &[u8], to: DType, out: &mut [u8]) -> u64 {
    match from {
        StoredType::Float(from) => convert(from, source, to, out),
        StoredType::F64 => convert_f64(source, to, out),
        _ => 0,
    }
}

/// [`round`] to any type of floats: f64 holds every f32. To another type, nothing.
pub fn store(values: &mut [f32], stored: StoredType, out: &mut [u8]) -> u64 {
    match stored {
        StoredType::Float(dtype) => return round(values, dtype, out),
        StoredType::F64 => {
            for (value, out) in values.iter().zip(out.as_chunks_mut::<8>().0) {
                *out = f64::from(*value).to_le_bytes();
            }
        }
        _ => {}
    }
    0
}

fn convert_f64(source: &[u8], to: DType, out: &mut [u8]) -> u64 {
    let mut overflowed = 0;
    let mut block = [0.0; BLOCK];
    for (source, out) in source.chunks(BLOCK * 8).zip(out.chunks_mut(BLOCK * to.bytes())) {
        let values = &mut block[..(source.len() / 8).min(out.len() / to.bytes())];
        for (bytes, value) in source.as_chunks::<8>().0.iter().zip(&mut *values) {
            let wide = f64::from_le_bytes(*bytes);
            *value = if to == DType::F32 { wide as f32 } else { to_odd(wide) };
            overflowed += u64::from(wide.is_finite() && value.is_infinite());
        }
        overflowed += narrow(to, values, out);
    }
    overflowed
}

/// The f32 next to a value on the side of zero, its last bit set if that is not the value: rounded once more, to a dtype of
/// fewer digits, it gives what rounding the value itself would.
fn to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    if f64::from(nearest) == value || value.is_nan() {
        return nearest;
    }
    let away = f64::from(nearest).abs() > value.abs();
    f32::from_bits((nearest.to_bits() - u32::from(away)) | 1)
}

/// How many values are infinite or not a number, of types that are not floats none; bytes behind the last whole value are
/// left alone.
#[must_use]
pub fn not_finite(stored: StoredType, bytes: &[u8]) -> u64 {
    // counted in u32, so that the loops become vector instructions; a block has far fewer values than that
    let halves = |exponent: u16| -> u64 {
        let blocks = bytes.as_chunks::<2>().0.chunks(BLOCK);
        blocks
            .map(|block| {
                let count = |b: &[u8; 2]| u32::from(u16::from_le_bytes(*b) & exponent == exponent);
                u64::from(block.iter().map(count).sum::<u32>())
            })
            .sum()
    };
    match stored {
        StoredType::Float(DType::F16) => halves(0x7c00),
        StoredType::Float(DType::BF16) => halves(0x7f80),
        StoredType::F64 => {
            let exponent = f64::INFINITY.to_bits();
            let values = bytes.as_chunks::<8>().0.iter();
            values.map(|b| u64::from(u64::from_le_bytes(*b) & exponent == exponent)).sum()
        }
        StoredType::Float(DType::F32) => {
            let blocks = bytes.as_chunks::<4>().0.chunks(BLOCK);
            blocks
                .map(|block| {
                    let count = |b: &[u8; 4]| u32::from(u32::from_le_bytes(*b) & 0x7f80_0000 == 0x7f80_0000);
                    u64::from(block.iter().map(count).sum::<u32>())
                })
                .sum()
        }
        _ => 0,
    }
}

/// Index of the first value that is infinite or not a number.
#[must_use]
pub fn first_not_finite(values: &[f32]) -> Option<usize> {
    // block by block without a branch for each value, so that the loop becomes vector instructions
    let any = |block: &[f32]| block.iter().fold(false, |any, value| any | !value.is_finite());
    let block = values.chunks(BLOCK).position(any)?;
    let within = values.get(block * BLOCK..)?.iter().position(|value| !value.is_finite())?;
    Some(block * BLOCK + within)
}

/// Bytes to f32, exactly.
fn widen(from: DType, source: &[u8], out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the processor has AVX2 and F16C
        unsafe { avx2::widen(from, source, out) };
        return;
    }
    portable::widen(from, source, out);
}

/// F32 to bytes, rounded; returns how many finite values became infinite.
fn narrow(to: DType, values: &[f32], out: &mut [u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if avx2::available() {
        // SAFETY: the processor has AVX2 and F16C
        return unsafe { avx2::narrow(to, values, out) };
    }
    portable::narrow(to, values, out)
}

#[allow(clippy::inline_always)] // they take on the instruction set of their caller
mod portable {
    use super::{DType, bf16, f16};

    #[inline(always)]
    pub(super) fn widen(from: DType, source: &[u8], out: &mut [f32]) {
        match from {
            DType::F32 => {
                for (bytes, out) in source.as_chunks::<4>().0.iter().zip(out) {
                    *out = f32::from_le_bytes(*bytes);
                }
            }
            DType::BF16 => {
                for (bytes, out) in source.as_chunks::<2>().0.iter().zip(out) {
                    *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                }
            }
            DType::F16 => {
                for (bytes, out) in source.as_chunks::<2>().0.iter().zip(out) {
                    *out = f16::from_le_bytes(*bytes).to_f32();
                }
            }
        }
    }

    #[inline(always)]
    pub(super) fn narrow(to: DType, values: &[f32], out: &mut [u8]) -> u64 {
        match to {
            DType::F32 => {
                for (value, out) in values.iter().zip(out.as_chunks_mut::<4>().0) {
                    *out = value.to_le_bytes();
                }
                return 0;
            }
            DType::BF16 => {
                for (value, out) in values.iter().zip(out.as_chunks_mut::<2>().0) {
                    *out = round_to_bf16(*value).to_le_bytes();
                }
            }
            DType::F16 => {
                for (value, out) in values.iter().zip(out.as_chunks_mut::<2>().0) {
                    *out = f16::from_f32(*value).to_le_bytes();
                }
            }
        }
        infinite_halves(to, out) - infinite(values)
    }

    /// As `half` does it, without a branch: the compiler makes vectors of it.
    #[inline(always)]
    fn round_to_bf16(value: f32) -> u16 {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16; // wraps only for what is not a number
        let nan = (bits >> 16) | 0x0040;
        (if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded }) as u16
    }

    #[inline(always)]
    pub(super) fn infinite(values: &[f32]) -> u64 {
        values.iter().map(|value| u32::from(value.to_bits() & 0x7fff_ffff == 0x7f80_0000)).sum::<u32>().into()
    }

    #[inline(always)]
    pub(super) fn infinite_halves(dtype: DType, out: &[u8]) -> u64 {
        let infinity = if dtype == DType::F16 { f16::INFINITY.to_bits() } else { bf16::INFINITY.to_bits() };
        let halves = out.as_chunks::<2>().0.iter();
        // a block has fewer values than 16 bits count
        halves.map(|bytes| u16::from(u16::from_le_bytes(*bytes) & 0x7fff == infinity)).sum::<u16>().into()
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        _MM_FROUND_TO_NEAREST_INT, _mm_loadu_si128, _mm_storeu_si128, _mm256_cvtph_ps, _mm256_cvtps_ph,
        _mm256_loadu_ps, _mm256_storeu_ps,
    };

    use super::{DType, portable};

    pub(super) fn available() -> bool {
        is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c")
    }

    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn widen(from: DType, source: &[u8], out: &mut [f32]) {
        if from != DType::F16 {
            return portable::widen(from, source, out); // compiled again, with 32-byte vectors
        }
        let (sources, source_rest) = source.as_chunks::<16>();
        let (outs, out_rest) = out.as_chunks_mut::<8>();
        for (source, out) in sources.iter().zip(&mut *outs) {
            // SAFETY: sixteen bytes are read and eight values written, neither needs alignment
            unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(source.as_ptr().cast()))) };
        }
        portable::widen(from, source_rest, out_rest);
    }

    #[target_feature(enable = "avx2,f16c")]
    pub(super) fn narrow(to: DType, values: &[f32], out: &mut [u8]) -> u64 {
        if to != DType::F16 {
            return portable::narrow(to, values, out);
        }
        let (sources, source_rest) = values.as_chunks::<8>();
        let (outs, out_rest) = out.split_at_mut(sources.len() * 16);
        for (source, out) in sources.iter().zip(outs.as_chunks_mut::<16>().0) {
            // SAFETY: eight values are read and sixteen bytes written, neither needs alignment
            unsafe {
                let halves = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm256_loadu_ps(source.as_ptr()));
                _mm_storeu_si128(out.as_mut_ptr().cast(), halves);
            }
        }
        let whole = portable::infinite_halves(to, outs) - portable::infinite(sources.as_flattened());
        whole + portable::narrow(to, source_rest, out_rest)
    }
}

#[cfg(test)]
mod tests;
