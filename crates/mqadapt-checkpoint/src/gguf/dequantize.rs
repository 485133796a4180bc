//! Blocks of quantised values to f32 or bf16, by the formulas of `ggml-quants.c` (`dequantize_row_*`), bit for bit.
//!
//! In: whole blocks as the file has them. Out: their values in order, little-endian. Products and sums are rounded one by
//! one, as in ggml and in candle, which the tests hold this against. The loops are written for the compiler to vectorise,
//! and compiled a second time for AVX2, which is chosen at run time.

#![allow(clippy::inline_always)] // a loop is only vectorised for AVX2 inside the function that enables it

use super::ggml_type::GgmlType;

/// Dequantises whole blocks to f32; `out` has 4 bytes for each value.
pub(super) fn to_f32(ty: GgmlType, blocks: &[u8], out: &mut [u8]) {
    run::<ToF32>(ty, blocks, out);
}

/// Dequantises whole blocks to bf16, rounding ties to even; `out` has 2 bytes for each value.
pub(super) fn to_bf16(ty: GgmlType, blocks: &[u8], out: &mut [u8]) {
    run::<ToBf16>(ty, blocks, out);
}

/// What values are written as.
trait Output {
    const BYTES: usize;
    fn put(values: &[f32], out: &mut [u8]);
}

struct ToF32;
struct ToBf16;

impl Output for ToF32 {
    const BYTES: usize = 4;

    #[inline(always)]
    fn put(values: &[f32], out: &mut [u8]) {
        for (value, out) in values.iter().zip(out.as_chunks_mut().0) {
            *out = value.to_le_bytes();
        }
    }
}

impl Output for ToBf16 {
    const BYTES: usize = 2;

    #[inline(always)]
    fn put(values: &[f32], out: &mut [u8]) {
        for (value, out) in values.iter().zip(out.as_chunks_mut().0) {
            let bits = value.to_bits();
            // half is added so that ties go to the even neighbour
            let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
            // every NaN becomes the same one: which of two a sum keeps depends on the instructions
            *out = (if value.is_nan() { 0x7fc0 } else { rounded } as u16).to_le_bytes();
        }
    }
}

fn run<O: Output>(ty: GgmlType, blocks: &[u8], out: &mut [u8]) {
    debug_assert_eq!(blocks.len() * ty.block_values() * O::BYTES, out.len() * ty.block_bytes());
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        return unsafe { run_avx2::<O>(ty, blocks, out) };
    }
    run_any::<O>(ty, blocks, out);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn run_avx2<O: Output>(ty: GgmlType, blocks: &[u8], out: &mut [u8]) {
    run_any::<O>(ty, blocks, out);
}

#[inline(always)]
fn run_any<O: Output>(ty: GgmlType, blocks: &[u8], out: &mut [u8]) {
    match ty {
        GgmlType::F32 => each::<O, 4, 1>(blocks, out, |block, y| y[0] = f32::from_le_bytes(*block)),
        GgmlType::F16 => each::<O, 2, 1>(blocks, out, |block, y| y[0] = scale(block, 0)),
        GgmlType::Bf16 => each::<O, 2, 1>(blocks, out, |b, y| y[0] = f32::from_le_bytes([0, 0, b[0], b[1]])),
        GgmlType::Q4_0 => each::<O, _, _>(blocks, out, q4_0),
        GgmlType::Q4_1 => each::<O, _, _>(blocks, out, q4_1),
        GgmlType::Q5_0 => each::<O, _, _>(blocks, out, q5_0),
        GgmlType::Q5_1 => each::<O, _, _>(blocks, out, q5_1),
        GgmlType::Q8_0 => each::<O, _, _>(blocks, out, q8_0),
        GgmlType::Q4K => each::<O, _, _>(blocks, out, q4_k),
        GgmlType::Q5K => each::<O, _, _>(blocks, out, q5_k),
        GgmlType::Q6K => each::<O, _, _>(blocks, out, q6_k),
    }
}

#[inline(always)]
fn each<O: Output, const B: usize, const V: usize>(
    blocks: &[u8],
    out: &mut [u8],
    one: impl Fn(&[u8; B], &mut [f32; V]),
) {
    let mut values = [0.0; V];
    for (block, out) in blocks.as_chunks::<B>().0.iter().zip(out.chunks_exact_mut(V * O::BYTES)) {
        one(block, &mut values);
        O::put(&values, out);
    }
}

/// The f16 at a fixed place of a block.
#[inline(always)]
fn scale<const B: usize>(block: &[u8; B], at: usize) -> f32 {
    let bits = u32::from(u16::from_le_bytes([block[at], block[at + 1]]));
    let (sign, rest) = ((bits & 0x8000) << 16, bits & 0x7fff);
    // exponents differ by 112 (127 - 15), subnormal ones too; infinity and NaN keep the highest exponent
    let finite = f32::from_bits(rest << 13) * f32::from_bits((127 + 112) << 23);
    let magnitude = if rest >= 0x7c00 { rest << 13 | 0x7f80_0000 } else { finite.to_bits() };
    f32::from_bits(sign | magnitude)
}

/// d, 16 bytes of two 4-bit values each: the low halves come first.
#[inline(always)]
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = scale(block, 0);
    for j in 0..16 {
        let byte = block[2 + j];
        out[j] = f32::from((byte & 0x0f).cast_signed() - 8) * d;
        out[j + 16] = f32::from((byte >> 4).cast_signed() - 8) * d;
    }
}

/// d, m, 16 bytes as in `Q4_0`.
#[inline(always)]
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (scale(block, 0), scale(block, 2));
    for j in 0..16 {
        let byte = block[4 + j];
        out[j] = f32::from(byte & 0x0f) * d + m;
        out[j + 16] = f32::from(byte >> 4) * d + m;
    }
}

/// d, 32 fifth bits, 16 bytes as in `Q4_0`.
#[inline(always)]
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = scale(block, 0);
    let high = u32::from_le_bytes([block[2], block[3], block[4], block[5]]);
    for j in 0..16 {
        let byte = block[6 + j];
        let (low_bit, high_bit) = (((high >> j) & 1) as u8, ((high >> (j + 16)) & 1) as u8);
        out[j] = f32::from((byte & 0x0f | low_bit << 4).cast_signed() - 16) * d;
        out[j + 16] = f32::from((byte >> 4 | high_bit << 4).cast_signed() - 16) * d;
    }
}

/// d, m, 32 fifth bits, 16 bytes as in `Q4_0`.
#[inline(always)]
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (scale(block, 0), scale(block, 2));
    let high = u32::from_le_bytes([block[4], block[5], block[6], block[7]]);
    for j in 0..16 {
        let byte = block[8 + j];
        let (low_bit, high_bit) = (((high >> j) & 1) as u8, ((high >> (j + 16)) & 1) as u8);
        out[j] = f32::from(byte & 0x0f | low_bit << 4) * d + m;
        out[j + 16] = f32::from(byte >> 4 | high_bit << 4) * d + m;
    }
}

/// d, 32 signed bytes.
#[inline(always)]
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = scale(block, 0);
    for j in 0..32 {
        out[j] = f32::from(block[2 + j].cast_signed()) * d;
    }
}

/// The 6-bit scale and minimum of group `j` of 8 (`get_scale_min_k4`); `packed` is 12 bytes.
#[inline(always)]
fn scale_and_min(packed: &[u8; 12], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let (low, high) = (packed[j + 4], (packed[j - 4] >> 6, packed[j] >> 6));
        (low & 0x0f | high.0 << 4, low >> 4 | high.1 << 4)
    };
    (f32::from(scale), f32::from(min))
}

#[inline(always)]
fn packed_scales<const B: usize>(block: &[u8; B]) -> [u8; 12] {
    std::array::from_fn(|j| block[4 + j])
}

/// d, dmin, 12 bytes of scales and minima, 128 bytes: four runs of 32 bytes, low halves then high halves.
#[inline(always)]
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, dmin, packed) = (scale(block, 0), scale(block, 2), packed_scales(block));
    for run in 0..4 {
        let (scale_1, min_1) = scale_and_min(&packed, 2 * run);
        let (scale_2, min_2) = scale_and_min(&packed, 2 * run + 1);
        let (d1, m1, d2, m2) = (d * scale_1, dmin * min_1, d * scale_2, dmin * min_2);
        for j in 0..32 {
            let byte = block[16 + 32 * run + j];
            out[64 * run + j] = d1 * f32::from(byte & 0x0f) - m1;
            out[64 * run + 32 + j] = d2 * f32::from(byte >> 4) - m2;
        }
    }
}

/// As `Q4_K`, with 32 bytes of fifth bits before the 128: bits `2 * run` and `2 * run + 1` of byte `j` belong to a run.
#[inline(always)]
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, dmin, packed) = (scale(block, 0), scale(block, 2), packed_scales(block));
    for run in 0..4 {
        let (scale_1, min_1) = scale_and_min(&packed, 2 * run);
        let (scale_2, min_2) = scale_and_min(&packed, 2 * run + 1);
        let (d1, m1, d2, m2) = (d * scale_1, dmin * min_1, d * scale_2, dmin * min_2);
        for j in 0..32 {
            let (high, byte) = (block[16 + j] >> (2 * run), block[48 + 32 * run + j]);
            out[64 * run + j] = d1 * f32::from(byte & 0x0f | (high & 1) << 4) - m1;
            out[64 * run + 32 + j] = d2 * f32::from(byte >> 4 | (high & 2) << 3) - m2;
        }
    }
}

/// 128 bytes of low 4 bits, 64 bytes of high 2 bits, 16 signed scales, d: two halves of 128 values.
#[inline(always)]
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let d = scale(block, 208);
    for half in 0..2 {
        let (low, high, scales, y) = (64 * half, 128 + 32 * half, 192 + 8 * half, 128 * half);
        let factor = |group: usize| d * f32::from(block[scales + group].cast_signed());
        for part in 0..2 {
            // values 16 * part .. 16 * part + 16 of each of the four runs of 32 share a scale
            let factors = [factor(part), factor(2 + part), factor(4 + part), factor(6 + part)];
            for j in 16 * part..16 * part + 16 {
                let (first, second, bits) = (block[low + j], block[low + 32 + j], block[high + j]);
                let value = |nibble: u8, shift: u32| f32::from((nibble | (bits >> shift & 3) << 4).cast_signed() - 32);
                out[y + j] = factors[0] * value(first & 0x0f, 0);
                out[y + 32 + j] = factors[1] * value(second & 0x0f, 2);
                out[y + 64 + j] = factors[2] * value(first >> 4, 4);
                out[y + 96 + j] = factors[3] * value(second >> 4, 6);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_core::quantized::{GgmlDType, QTensor, ggml_file::qtensor_from_ggml};

    use super::*;

    fn candle_type(ty: GgmlType) -> GgmlDType {
        match ty {
            GgmlType::F32 => GgmlDType::F32,
            GgmlType::F16 => GgmlDType::F16,
            GgmlType::Bf16 => GgmlDType::BF16,
            GgmlType::Q4_0 => GgmlDType::Q4_0,
            GgmlType::Q4_1 => GgmlDType::Q4_1,
            GgmlType::Q5_0 => GgmlDType::Q5_0,
            GgmlType::Q5_1 => GgmlDType::Q5_1,
            GgmlType::Q8_0 => GgmlDType::Q8_0,
            GgmlType::Q4K => GgmlDType::Q4K,
            GgmlType::Q5K => GgmlDType::Q5K,
            GgmlType::Q6K => GgmlDType::Q6K,
        }
    }

    /// Bytes of a linear congruential generator; the f16 scales among them take any value, infinities included.
    fn bytes(count: usize) -> Vec<u8> {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 56) as u8
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn every_type_equals_candle_bit_for_bit() {
        for ty in GgmlType::ALL {
            let blocks = 512 / ty.block_values() * 64;
            let data = bytes(blocks * ty.block_bytes());
            let mut bytes = vec![0; 4 * blocks * ty.block_values()];
            to_f32(ty, &data, &mut bytes);
            let ours: Vec<f32> = bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect();
            let theirs: QTensor = qtensor_from_ggml(candle_type(ty), &data, vec![ours.len()], &Device::Cpu).unwrap();
            let theirs: Vec<f32> = theirs.dequantize(&Device::Cpu).unwrap().to_vec1().unwrap();
            for (index, (a, b)) in ours.iter().zip(&theirs).enumerate() {
                assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(), "{ty:?} value {index}: {a} and {b}");
            }
        }
    }

    #[test]
    fn bf16_is_the_f32_rounded_once() {
        for ty in GgmlType::ALL {
            let data = bytes(1 << 18).repeat(2);
            let blocks = data.len() / ty.block_bytes();
            let data = &data[..blocks * ty.block_bytes()];
            let (mut wide, mut narrow) =
                (vec![0; 4 * blocks * ty.block_values()], vec![0; 2 * blocks * ty.block_values()]);
            to_f32(ty, data, &mut wide);
            to_bf16(ty, data, &mut narrow);
            for (wide, narrow) in wide.as_chunks().0.iter().zip(narrow.as_chunks().0) {
                let (wide, narrow) = (f32::from_le_bytes(*wide), half::bf16::from_le_bytes(*narrow));
                let expected = half::bf16::from_f32(wide);
                assert!(narrow.to_bits() == expected.to_bits() || narrow.is_nan() && wide.is_nan(), "{ty:?} {wide}");
            }
        }
    }

    #[test]
    fn every_f16_is_exact() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (scale(&bits.to_le_bytes(), 0), half::f16::from_bits(bits).to_f32());
            assert!(ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(), "{bits:#06x}");
        }
    }

    #[test]
    fn the_avx2_code_equals_the_other() {
        for ty in GgmlType::ALL {
            let data = bytes(ty.block_bytes() * 999);
            let (mut chosen, mut plain) = (vec![0; 2 * 999 * ty.block_values()], vec![0; 2 * 999 * ty.block_values()]);
            run::<ToBf16>(ty, &data, &mut chosen);
            run_any::<ToBf16>(ty, &data, &mut plain);
            assert!(chosen == plain, "{ty:?}");
        }
    }
}
