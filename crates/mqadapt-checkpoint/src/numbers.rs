//! Conversion between the float types, on little-endian bytes, with exact rounding (ties to even, NaN stays NaN).

use half::{bf16, f16};
use mqadapt_core::DType;

/// Converts values; returns how many finite ones became infinite (only `F16` is too narrow for that to matter).
/// Both slices hold the same number of values; a rest that is not a whole value is left alone.
pub fn convert(from: DType, source: &[u8], to: DType, out: &mut [u8]) -> u64 {
    if from == to {
        out.copy_from_slice(source);
        return 0;
    }
    let mut overflowed = 0;
    let mut put = |value: f32, bytes: &mut [u8]| match to {
        DType::F32 => bytes.copy_from_slice(&value.to_le_bytes()),
        DType::BF16 => bytes.copy_from_slice(&bf16::from_f32(value).to_le_bytes()),
        DType::F16 => {
            let rounded = f16::from_f32(value);
            overflowed += u64::from(rounded.is_infinite() && value.is_finite());
            bytes.copy_from_slice(&rounded.to_le_bytes());
        }
    };
    let outs = out.chunks_exact_mut(to.bytes());
    match from {
        DType::F32 => {
            for (bytes, out) in source.as_chunks::<4>().0.iter().zip(outs) {
                put(f32::from_le_bytes(*bytes), out);
            }
        }
        DType::F16 => {
            for (bytes, out) in source.as_chunks::<2>().0.iter().zip(outs) {
                put(f16::from_le_bytes(*bytes).to_f32(), out);
            }
        }
        DType::BF16 => {
            for (bytes, out) in source.as_chunks::<2>().0.iter().zip(outs) {
                put(bf16::from_le_bytes(*bytes).to_f32(), out);
            }
        }
    }
    overflowed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_to_even_and_reports_overflow() {
        let values = [1.0f32, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, 70_000.0, f32::INFINITY, f32::NAN, -0.0];
        let source: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let mut out = vec![0; values.len() * 2];
        assert_eq!(convert(DType::F32, &source, DType::BF16, &mut out), 0);
        let back: Vec<bf16> = out.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b)).collect();
        assert_eq!(back[1].to_f32(), 1.0, "a tie goes to the even neighbour");
        assert_eq!(back[2].to_f32(), 1.0 + 4.0 / 256.0);
        assert!(back[5].is_nan() && back[6].to_bits() == 0x8000);
        assert_eq!(convert(DType::F32, &source, DType::F16, &mut out), 1, "70,000 is too large, infinity is not new");
    }

    #[test]
    fn every_half_comes_back() {
        for dtype in [DType::F16, DType::BF16] {
            let source: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
            let (mut wide, mut back) = (vec![0; source.len() * 2], vec![0; source.len()]);
            convert(dtype, &source, DType::F32, &mut wide);
            convert(DType::F32, &wide, dtype, &mut back);
            for (bits, (a, b)) in source.as_chunks::<2>().0.iter().zip(back.as_chunks::<2>().0).enumerate() {
                let nan = match dtype {
                    DType::F16 => f16::from_le_bytes(*a).is_nan() && f16::from_le_bytes(*b).is_nan(),
                    _ => bf16::from_le_bytes(*a).is_nan() && bf16::from_le_bytes(*b).is_nan(),
                };
                assert!(a == b || nan, "{dtype:?} {bits:#06x}");
            }
        }
    }
}
