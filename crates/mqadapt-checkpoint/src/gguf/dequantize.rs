//! Blocks of quantised values to f32, by the formulas of `ggml-quants.c` (`dequantize_row_*`), bit for bit.
//!
//! In: whole blocks as the file has them. Out: their values in order. Products and sums are rounded one by one, as in
//! ggml and in candle, which the tests hold this against.

use half::{bf16, f16};

use super::ggml_type::GgmlType;

/// Dequantises `out.len() / block_values` blocks; both slices hold whole blocks and the same number of them.
pub(super) fn to_f32(ty: GgmlType, blocks: &[u8], out: &mut [f32]) {
    debug_assert_eq!(blocks.len() * ty.block_values(), out.len() * ty.block_bytes());
    match ty {
        GgmlType::F32 => each(blocks, out, |b: &[u8; 4], y: &mut [f32; 1]| y[0] = f32::from_le_bytes(*b)),
        GgmlType::F16 => each(blocks, out, |b: &[u8; 2], y: &mut [f32; 1]| y[0] = f16::from_le_bytes(*b).to_f32()),
        GgmlType::Bf16 => each(blocks, out, |b: &[u8; 2], y: &mut [f32; 1]| y[0] = bf16::from_le_bytes(*b).to_f32()),
        GgmlType::Q4_0 => each(blocks, out, q4_0),
        GgmlType::Q4_1 => each(blocks, out, q4_1),
        GgmlType::Q5_0 => each(blocks, out, q5_0),
        GgmlType::Q5_1 => each(blocks, out, q5_1),
        GgmlType::Q8_0 => each(blocks, out, q8_0),
        GgmlType::Q4K => each(blocks, out, q4_k),
        GgmlType::Q5K => each(blocks, out, q5_k),
        GgmlType::Q6K => each(blocks, out, q6_k),
    }
}

fn each<const B: usize, const V: usize>(blocks: &[u8], out: &mut [f32], one: impl Fn(&[u8; B], &mut [f32; V])) {
    let (blocks, _) = blocks.as_chunks::<B>();
    let (values, _) = out.as_chunks_mut::<V>();
    for (block, values) in blocks.iter().zip(values) {
        one(block, values);
    }
}

/// The f16 at a fixed place of a block.
fn scale<const B: usize>(block: &[u8; B], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// d, 16 bytes of two 4-bit values each: the low halves come first.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = scale(block, 0);
    for j in 0..16 {
        let byte = block[2 + j];
        out[j] = f32::from((byte & 0x0f).cast_signed() - 8) * d;
        out[j + 16] = f32::from((byte >> 4).cast_signed() - 8) * d;
    }
}

/// d, m, 16 bytes as in `Q4_0`.
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (scale(block, 0), scale(block, 2));
    for j in 0..16 {
        let byte = block[4 + j];
        out[j] = f32::from(byte & 0x0f) * d + m;
        out[j + 16] = f32::from(byte >> 4) * d + m;
    }
}

/// d, 32 fifth bits, 16 bytes as in `Q4_0`.
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
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = scale(block, 0);
    for j in 0..32 {
        out[j] = f32::from(block[2 + j].cast_signed()) * d;
    }
}

/// The 6-bit scale and minimum of group `j` of 8 (`get_scale_min_k4`); `packed` is 12 bytes.
fn scale_and_min(packed: &[u8; 12], j: usize) -> (f32, f32) {
    let (scale, min) = if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        let (low, high) = (packed[j + 4], (packed[j - 4] >> 6, packed[j] >> 6));
        (low & 0x0f | high.0 << 4, low >> 4 | high.1 << 4)
    };
    (f32::from(scale), f32::from(min))
}

fn packed_scales<const B: usize>(block: &[u8; B]) -> [u8; 12] {
    std::array::from_fn(|j| block[4 + j])
}

/// d, dmin, 12 bytes of scales and minima, 128 bytes: four runs of 32 bytes, low halves then high halves.
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
            let mut ours = vec![0.0; blocks * ty.block_values()];
            to_f32(ty, &data, &mut ours);
            let theirs: QTensor = qtensor_from_ggml(candle_type(ty), &data, vec![ours.len()], &Device::Cpu).unwrap();
            let theirs: Vec<f32> = theirs.dequantize(&Device::Cpu).unwrap().to_vec1().unwrap();
            for (index, (a, b)) in ours.iter().zip(&theirs).enumerate() {
                assert!(a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan(), "{ty:?} value {index}: {a} and {b}");
            }
        }
    }
}
