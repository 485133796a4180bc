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

/// Against the two neighbours in the smaller dtype: the nearer one, on a tie the even one.
#[test]
fn f64_is_rounded_once() {
    let mut values = vec![0.0, -0.0, f64::INFINITY, f64::NEG_INFINITY, 1e300, -1e300, 1e-300, f64::MIN_POSITIVE];
    for narrow in samples().into_iter().filter(|value| value.is_finite()) {
        // ties of the halves, and values next to them that f32 cannot tell from the tie
        for part in [0.0, 1e-12, -1e-12, 1e-9, -1e-9, 1e-4] {
            values.push(f64::from(narrow) * (1.0 + part));
        }
    }
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut single = vec![0; values.len() * 4];
    let overflowed = convert_stored(StoredType::F64, &bytes, DType::F32, &mut single);
    for (value, found) in values.iter().zip(single.as_chunks::<4>().0) {
        assert_eq!(f32::from_le_bytes(*found).to_bits(), (*value as f32).to_bits());
    }
    assert_eq!(overflowed, values.iter().filter(|v| v.is_finite() && (**v as f32).is_infinite()).count() as u64);
    assert!(overflowed > 0);
    for dtype in HALVES {
        let mut out = vec![0; values.len() * 2];
        let overflowed = convert_stored(StoredType::F64, &bytes, dtype, &mut out);
        let mut infinite = 0;
        for (value, found) in values.iter().zip(out.as_chunks::<2>().0) {
            let bits = u16::from_le_bytes(*found);
            let wide = |bits: u16| f64::from(reference_widened(dtype, bits));
            let found = wide(bits);
            assert_eq!(found.is_sign_negative(), value.is_sign_negative());
            infinite += u64::from(found.is_infinite() && value.is_finite());
            if found.is_infinite() {
                let below = wide(bits - 1).abs();
                let step = below - wide(bits - 2).abs();
                assert!(value.abs() >= below + step / 2.0, "{dtype:?} {value:e}");
                continue;
            }
            let magnitude = bits & 0x7fff;
            for next in [magnitude.saturating_sub(1), magnitude + 1] {
                let (own, other) = ((wide(magnitude) - value.abs()).abs(), (wide(next) - value.abs()).abs());
                let tie_to_even = own == other && magnitude % 2 == 0;
                assert!(next == magnitude || own < other || tie_to_even, "{dtype:?} {value:e} {bits:#06x}");
            }
        }
        assert_eq!(overflowed, infinite);
        assert!(overflowed > 0);
    }
    let mut nan = [0; 2];
    assert_eq!(convert_stored(StoredType::F64, &f64::NAN.to_le_bytes(), DType::BF16, &mut nan), 0);
    assert!(bf16::from_le_bytes(nan).is_nan());
}

#[test]
fn f64_holds_what_is_stored() {
    let mut values = samples();
    values.retain(|value| !value.is_nan());
    let before = values.clone();
    let mut out = vec![0; values.len() * 8];
    assert_eq!(store(&mut values, StoredType::F64, &mut out), 0);
    let mut again = vec![0; values.len() * 4];
    assert_eq!(convert_stored(StoredType::F64, &out, DType::F32, &mut again), 0);
    assert_eq!(again, bytes(&before));
}
