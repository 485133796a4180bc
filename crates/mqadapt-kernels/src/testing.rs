//! What the kernels' tests share: random values, stored dtypes, tolerances, every tier.

use crate::{Cpu, FloatsRef, Isa, WeightsRef};
use half::{bf16, f16};

/// A handle for every tier of this machine, with 1 and with 3 threads.
pub(crate) fn cpus() -> Vec<Cpu> {
    Isa::available().flat_map(|isa| [Cpu::new(isa, 1), Cpu::new(isa, 3)]).collect()
}

/// Evenly spread values in -1..1 (xorshift).
pub(crate) fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..len).map(|_| next()).collect()
}

/// Random values in every stored dtype.
pub(crate) struct Stored {
    pub(crate) f32: Vec<f32>,
    pub(crate) f16: Vec<f16>,
    pub(crate) bf16: Vec<bf16>,
}

impl Stored {
    pub(crate) fn random(seed: u64, len: usize) -> Self {
        let f32 = random(seed, len);
        let f16 = f32.iter().map(|&value| f16::from_f32(value)).collect();
        let bf16 = f32.iter().map(|&value| bf16::from_f32(value)).collect();
        Self { f32, f16, bf16 }
    }

    /// Each dtype with its values in `f64`.
    pub(crate) fn floats(&self) -> [(FloatsRef<'_>, Vec<f64>); 3] {
        [
            (FloatsRef::F32(&self.f32), self.f32.iter().map(|&value| f64::from(value)).collect()),
            (FloatsRef::F16(&self.f16), self.f16.iter().map(|&value| value.to_f64()).collect()),
            (FloatsRef::Bf16(&self.bf16), self.bf16.iter().map(|&value| value.to_f64()).collect()),
        ]
    }

    pub(crate) fn weights(&self) -> [(WeightsRef<'_>, Vec<f64>); 3] {
        self.floats().map(|(floats, values)| match floats {
            FloatsRef::F32(values32) => (WeightsRef::F32(values32), values),
            FloatsRef::F16(values16) => (WeightsRef::F16(values16), values),
            FloatsRef::Bf16(values16) => (WeightsRef::Bf16(values16), values),
        })
    }
}

/// Asserts `|a - b| <= tolerance * (1 + |b|)` element by element.
#[track_caller]
pub(crate) fn close(what: &str, a: &[f32], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (index, (&a, &b)) in a.iter().zip(b).enumerate() {
        let a = f64::from(a);
        assert!((a - b).abs() <= tolerance * (1.0 + b.abs()), "{what}: element {index} is {a}, expected {b}");
    }
}

/// Asserts equal bits.
#[track_caller]
pub(crate) fn same(what: &str, a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len(), "{what}");
    for (index, (a, b)) in a.iter().zip(b).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}: element {index} is {a}, expected {b}");
    }
}
