use super::*;

const HALVES: [DType; 2] = [DType::F16, DType::BF16];

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// What `half` makes of a value.
fn reference(dtype: DType, value: f32) -> u16 {
    if dtype == DType::F16 { f16::from_f32(value).to_bits() } else { bf16::from_f32(value).to_bits() }
}

fn reference_widened(dtype: DType, bits: u16) -> f32 {
    if dtype == DType::F16 { f16::from_bits(bits).to_f32() } else { bf16::from_bits(bits).to_f32() }
}

fn same(a: f32, b: f32) -> bool {
    a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan())
}

/// Values of every size, next to ties, subnormal, infinite and not numbers; of a length that no vector divides.
fn samples() -> Vec<f32> {
    let mut values =
        vec![0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, -f32::NAN, f32::MAX, 65_504.0, 65_519.9, 65_520.0];
    for exponent in 0..=255u32 {
        for mantissa in [0, 1, 0x0fff, 0x1000, 0x1001, 0x3000, 0x7fff, 0x8000, 0x8001, 0x1_8000, 0x7f_ffff] {
            values.extend([0, 1].map(|sign| f32::from_bits(sign << 31 | exponent << 23 | mantissa)));
        }
    }
    values.truncate(values.len() / 8 * 8 + 5);
    values
}

#[test]
fn rounds_as_half_does() {
    let values = samples();
    for dtype in HALVES {
        let mut out = vec![0; values.len() * 2];
        let overflowed = convert(DType::F32, &bytes(&values), dtype, &mut out);
        let expected: Vec<u16> = values.iter().map(|value| reference(dtype, *value)).collect();
        for ((value, found), expected) in values.iter().zip(out.as_chunks::<2>().0).zip(&expected) {
            let found = u16::from_le_bytes(*found);
            let (a, b) = (reference_widened(dtype, found), reference_widened(dtype, *expected));
            assert!(same(a, b), "{dtype:?} {value:e} {found:#06x} {expected:#06x}");
        }
        let infinite = expected.iter().filter(|bits| reference_widened(dtype, **bits).is_infinite()).count();
        let before = values.iter().filter(|value| value.is_infinite()).count();
        assert_eq!(overflowed, (infinite - before) as u64);
        assert!(overflowed > 0);
    }
}

#[test]
fn vectors_equal_their_scalar_twin() {
    let values = samples();
    for dtype in HALVES {
        for len in (0..40).chain([BLOCK - 1, BLOCK]) {
            let values = &values[values.len() - len.min(values.len())..];
            let (mut one, mut two) = (vec![0; len * 2], vec![0; len * 2]);
            assert_eq!(narrow(dtype, values, &mut one), portable::narrow(dtype, values, &mut two));
            let (mut wide, mut twin) = (vec![0.0; len], vec![0.0; len]);
            widen(dtype, &one, &mut wide);
            portable::widen(dtype, &two, &mut twin);
            assert!(wide.iter().zip(&twin).all(|(a, b)| same(*a, *b)), "{dtype:?} {len}");
        }
    }
}

#[test]
fn every_half_comes_back() {
    let source: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for dtype in HALVES {
        let (mut wide, mut back) = (vec![0; source.len() * 2], vec![0; source.len()]);
        assert_eq!(convert(dtype, &source, DType::F32, &mut wide), 0);
        assert_eq!(convert(DType::F32, &wide, dtype, &mut back), 0);
        for (before, after) in source.as_chunks::<2>().0.iter().zip(back.as_chunks::<2>().0) {
            let widened = |bytes: &[u8; 2]| reference_widened(dtype, u16::from_le_bytes(*bytes));
            assert!(before == after || same(widened(before), widened(after)), "{dtype:?} {before:?} {after:?}");
        }
    }
}

#[test]
fn between_halves_there_is_one_rounding() {
    let source: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for (from, to) in [(DType::F16, DType::BF16), (DType::BF16, DType::F16)] {
        let mut out = vec![0; source.len()];
        convert(from, &source, to, &mut out);
        for (bits, found) in (0..=u16::MAX).zip(out.as_chunks::<2>().0) {
            let expected = reference(to, reference_widened(from, bits));
            let (a, b) = (reference_widened(to, u16::from_le_bytes(*found)), reference_widened(to, expected));
            assert!(same(a, b), "{from:?} {bits:#06x}");
        }
    }
}

#[test]
fn rounding_in_place_stores_what_it_leaves() {
    for dtype in [DType::F16, DType::BF16, DType::F32] {
        let mut values = samples();
        let before = values.clone();
        let mut out = vec![0; values.len() * dtype.bytes()];
        let overflowed = round(&mut values, dtype, &mut out);
        let mut expected = vec![0; out.len()];
        assert_eq!(convert(DType::F32, &bytes(&before), dtype, &mut expected), overflowed);
        assert_eq!(out, expected);
        let mut stored = vec![0; values.len() * 4];
        convert(dtype, &out, DType::F32, &mut stored);
        assert!(values.iter().zip(stored.as_chunks::<4>().0).all(|(a, b)| same(*a, f32::from_le_bytes(*b))));
    }
}
