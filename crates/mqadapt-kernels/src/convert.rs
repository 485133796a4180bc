//! Conversions between stored dtypes, rounded to nearest with ties to even.

use crate::{
    Cpu, FloatsMut, FloatsRef, Isa, WeightsRef,
    pool::Parts,
    simd::{Element, Simd, kernel},
};
use half::{bf16, f16};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

impl Cpu {
    /// Converts every value of `from` into the dtype of `to`, exactly rounded; NaN stays NaN.
    ///
    /// Returns how many finite values overflowed to infinity, which `f32` or `bf16` to `f16` and,
    /// above 3.39e38, `f32` to `bf16` can do.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn convert(&self, from: FloatsRef<'_>, to: FloatsMut<'_>) -> usize {
        assert_eq!(from.len(), to.len(), "both are equally long");
        match (from, to) {
            (FloatsRef::F32(from), FloatsMut::F32(to)) => self.map(from, to, |from, to| {
                to.copy_from_slice(from);
                0
            }),
            (FloatsRef::F32(from), FloatsMut::F16(to)) => {
                self.map(from, to, |from, to| f16_from_f32(self.isa, from, to))
            }
            (FloatsRef::F32(from), FloatsMut::Bf16(to)) => {
                self.map(from, to, |from, to| bf16_from_f32(self.isa, from, to))
            }
            (FloatsRef::F16(from), FloatsMut::F32(to)) => {
                self.map(from, to, |from, to| f32_from_f16(self.isa, from, to))
            }
            (FloatsRef::F16(from), FloatsMut::F16(to)) => self.map(from, to, |from, to| {
                to.copy_from_slice(from);
                0
            }),
            (FloatsRef::F16(from), FloatsMut::Bf16(to)) => self.map(from, to, |from, to| {
                via_f32(
                    from,
                    to,
                    |from, wide| f32_from_f16(self.isa, from, wide),
                    |wide, to| bf16_from_f32(self.isa, wide, to),
                )
            }),
            (FloatsRef::Bf16(from), FloatsMut::F32(to)) => {
                self.map(from, to, |from, to| f32_from_bf16(self.isa, from, to))
            }
            (FloatsRef::Bf16(from), FloatsMut::F16(to)) => self.map(from, to, |from, to| {
                via_f32(
                    from,
                    to,
                    |from, wide| f32_from_bf16(self.isa, from, wide),
                    |wide, to| f16_from_f32(self.isa, wide, to),
                )
            }),
            (FloatsRef::Bf16(from), FloatsMut::Bf16(to)) => self.map(from, to, |from, to| {
                to.copy_from_slice(from);
                0
            }),
        }
    }

    /// Rounds every value to `bf16` in place, as a model that computes in `bf16` does between its operations.
    pub fn round_to_bf16(&self, x: &mut [f32]) {
        let (len, parts) = (x.len(), Parts::new(x));
        self.by_rows(len, 1, |first, n| {
            // SAFETY: parts are disjoint.
            for value in unsafe { parts.part(first, n) } {
                *value = f32::from_bits(u32::from(round_bf16(value.to_bits())) << 16);
            }
        });
    }

    /// Copies rows `ids` of a matrix `[n, k]`, times `scale`, into `out`, `[ids.len(), k]`: the embedding.
    ///
    /// # Panics
    /// If a shape does not fit or an id is `n` or more.
    pub fn gather_rows(&self, weights: WeightsRef<'_>, k: usize, ids: &[u32], scale: f32, out: &mut [f32]) {
        let n = weights.rows(k);
        assert_eq!(out.len(), ids.len() * k, "out is [{}, {k}]", ids.len());
        let parts = Parts::new(out);
        self.by_rows(ids.len(), k, |first, rows| {
            for index in first..first + rows {
                let row = ids[index] as usize;
                assert!(row < n, "id {row} of a table of {n}");
                // SAFETY: rows are disjoint.
                let to = unsafe { parts.part(index * k, k) };
                let range = row * k..(row + 1) * k;
                match weights {
                    WeightsRef::F32(values) => to.copy_from_slice(&values[range]),
                    WeightsRef::F16(values) => _ = f32_from_f16(self.isa, &values[range], to),
                    WeightsRef::Bf16(values) => _ = f32_from_bf16(self.isa, &values[range], to),
                    WeightsRef::Int8(weights) => {
                        for (to, value) in to.iter_mut().zip(&weights.values[range]) {
                            *to = f32::from(*value) * weights.scales[row];
                        }
                    }
                }
                if scale.to_bits() != 1f32.to_bits() {
                    for value in to {
                        *value *= scale;
                    }
                }
            }
        });
    }

    fn map<T: Sync, U: Send>(&self, from: &[T], to: &mut [U], body: impl Fn(&[T], &mut [U]) -> usize + Sync) -> usize {
        let overflows = AtomicUsize::new(0);
        let parts = Parts::new(to);
        self.by_rows(from.len(), 1, |first, n| {
            // SAFETY: parts are disjoint.
            overflows.fetch_add(body(&from[first..][..n], unsafe { parts.part(first, n) }), Relaxed);
        });
        overflows.into_inner()
    }
}

/// Rounds every value to `bf16`.
pub(crate) fn round_to_bf16(from: &[f32], to: &mut [f32]) {
    for (from, to) in from.iter().zip(to) {
        *to = f32::from_bits(u32::from(round_bf16(from.to_bits())) << 16);
    }
}

/// Two half-width dtypes by way of `f32`, which holds both exactly.
fn via_f32<T, U>(
    from: &[T],
    to: &mut [U],
    widen: impl Fn(&[T], &mut [f32]) -> usize,
    round: impl Fn(&[f32], &mut [U]) -> usize,
) -> usize {
    let mut wide = [0.0; 512];
    let mut overflows = 0;
    for (from, to) in from.chunks(wide.len()).zip(to.chunks_mut(512)) {
        let wide = &mut wide[..from.len()];
        widen(from, wide);
        overflows += round(wide, to);
    }
    overflows
}

/// The nearest `bf16` of a float's bits, ties to even; NaN keeps its sign and top bits and becomes quiet.
#[inline(always)]
fn round_bf16(bits: u32) -> u16 {
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    let quiet = (bits >> 16) as u16 | 0x40;
    if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded }
}

macro_rules! checked {
    ($(#[$meta:meta])* fn $name:ident($From:ty, $To:ty) = $kernel:expr) => {
        $(#[$meta])*
        pub(crate) fn $name(isa: Isa, from: &[$From], to: &mut [$To]) -> usize {
            assert_eq!(from.len(), to.len(), "both are equally long");
            // SAFETY: two slices of one length; a `Cpu` holds only an available `isa`.
            unsafe { $kernel(isa, from, to) }
        }
    };
}

checked! {
    /// Returns how many finite values became infinite.
    fn bf16_from_f32(f32, bf16) = narrow_bf16
}
checked! {
    /// Returns 0.
    fn f32_from_bf16(bf16, f32) = widen::<bf16>
}
checked! {
    /// Returns 0.
    fn f32_from_f16(f16, f32) = widen::<f16>
}
checked! {
    /// Returns how many finite values became infinite.
    fn f16_from_f32(f32, f16) = narrow_f16
}

kernel! { fn narrow_bf16 = narrow_bf16_body(from: &[f32], to: &mut [bf16]) -> usize }
kernel! { fn narrow_f16 = narrow_f16_body(from: &[f32], to: &mut [f16]) -> usize }
kernel! { fn widen<E: Element> = widen_body(from: &[E], to: &mut [f32]) -> usize }

// The narrowing loops are over integers: the compiler turns them into the instruction set's vectors.

#[inline(always)]
unsafe fn narrow_bf16_body<S: Simd>(from: &[f32], to: &mut [bf16]) -> usize {
    let mut overflows = 0u32;
    for (from, to) in from.iter().zip(to) {
        let bits = from.to_bits();
        let rounded = round_bf16(bits);
        *to = bf16::from_bits(rounded);
        overflows += u32::from(rounded & 0x7fff == 0x7f80 && bits & 0x7fff_ffff < 0x7f80_0000);
    }
    overflows as usize
}

#[inline(always)]
unsafe fn narrow_f16_body<S: Simd>(from: &[f32], to: &mut [f16]) -> usize {
    let mut overflows = 0u32;
    for (from, to) in from.iter().zip(to) {
        let rounded = round_f16(from.to_bits());
        *to = f16::from_bits(rounded);
        overflows += u32::from(rounded & 0x7fff == 0x7c00 && from.to_bits() & 0x7fff_ffff < 0x7f80_0000);
    }
    overflows as usize
}

/// # Safety
/// Both have one length.
#[inline(always)]
unsafe fn widen_body<S: Simd, E: Element>(from: &[E], to: &mut [f32]) -> usize {
    let n = to.len();
    let mut i = 0;
    while i < n {
        // SAFETY: reads and writes the lanes below `n`.
        unsafe { S::store_some(to.as_mut_ptr().add(i), n - i, E::load_some::<S>(from.as_ptr().add(i), n - i)) };
        i += S::LANES;
    }
    0
}

/// The nearest `f16` of a float's bits, ties to even; NaN keeps its sign and top bits and becomes quiet.
///
/// Branch-free, so that loops over it become vectors.
#[inline(always)]
fn round_f16(bits: u32) -> u16 {
    let sign = (bits >> 16 & 0x8000) as u16;
    let magnitude = bits & 0x7fff_ffff;
    // Normal: rebias the exponent, then round off 13 bits; 65520 and above carries into infinity.
    let normal = (magnitude.wrapping_sub(112 << 23).wrapping_add(0xfff + (magnitude >> 13 & 1)) >> 13).min(0x7c00);
    // Below 2^-14: adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded by the addition itself.
    let subnormal = (f32::from_bits(magnitude) + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let nan = 0x7e00 | magnitude >> 13 & 0x3ff;
    let finite = if magnitude < 113 << 23 { subnormal } else { normal };
    sign | if magnitude > 0x7f80_0000 { nan } else { finite } as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Floats around every rounding boundary of both half formats: all 16-bit prefixes with telling tails.
    fn telling() -> Vec<f32> {
        let tails = [0, 1, 0x0fff, 0x1000, 0x1001, 0x2fff, 0x3000, 0x7fff, 0x8000, 0x8001, 0xffff];
        (0..=u16::MAX).flat_map(|high| tails.map(|low| f32::from_bits(u32::from(high) << 16 | low))).collect()
    }

    fn same(a: f32, b: f32) -> bool {
        a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
    }

    #[test]
    fn rounding_equals_half_on_every_tier() {
        let values = telling();
        for isa in Isa::available() {
            let cpu = Cpu::new(isa, 2);
            let mut narrow = vec![bf16::ZERO; values.len()];
            let overflows = cpu.convert(FloatsRef::F32(&values), FloatsMut::Bf16(&mut narrow));
            for (from, to) in values.iter().zip(&narrow) {
                assert!(same(to.to_f32(), bf16::from_f32(*from).to_f32()), "{isa}: {from:e} to {to}");
            }
            let expected = values.iter().filter(|v| v.is_finite() && bf16::from_f32(**v).is_infinite()).count();
            assert_eq!(overflows, expected);
            assert!(overflows > 0);

            let mut narrow = vec![f16::ZERO; values.len()];
            let overflows = cpu.convert(FloatsRef::F32(&values), FloatsMut::F16(&mut narrow));
            for (from, to) in values.iter().zip(&narrow) {
                assert!(same(to.to_f32(), f16::from_f32(*from).to_f32()), "{isa}: {from:e} to {to}");
            }
            let expected = values.iter().filter(|v| v.is_finite() && f16::from_f32(**v).is_infinite()).count();
            assert_eq!(overflows, expected);
        }
    }

    #[test]
    fn all_half_values_convert_on_every_tier() {
        let halves: Vec<_> = (0..=u16::MAX).map(f16::from_bits).collect();
        let brains: Vec<_> = (0..=u16::MAX).map(bf16::from_bits).collect();
        for isa in Isa::available() {
            let cpu = Cpu::new(isa, 2);
            let mut wide = vec![0.0; 1 << 16];
            assert_eq!(cpu.convert(FloatsRef::F16(&halves), FloatsMut::F32(&mut wide)), 0);
            assert!(wide.iter().zip(&halves).all(|(wide, half)| same(*wide, half.to_f32())), "{isa}");
            assert_eq!(cpu.convert(FloatsRef::Bf16(&brains), FloatsMut::F32(&mut wide)), 0);
            assert!(wide.iter().zip(&brains).all(|(wide, brain)| same(*wide, brain.to_f32())), "{isa}");

            let mut to_brain = vec![bf16::ZERO; 1 << 16];
            cpu.convert(FloatsRef::F16(&halves), FloatsMut::Bf16(&mut to_brain));
            let right = |(to, from): (&bf16, &f16)| same(to.to_f32(), bf16::from_f32(from.to_f32()).to_f32());
            assert!(to_brain.iter().zip(&halves).all(right), "{isa}");
            let mut to_half = vec![f16::ZERO; 1 << 16];
            let overflows = cpu.convert(FloatsRef::Bf16(&brains), FloatsMut::F16(&mut to_half));
            let right = |(to, from): (&f16, &bf16)| same(to.to_f32(), f16::from_f32(from.to_f32()).to_f32());
            assert!(to_half.iter().zip(&brains).all(right), "{isa}");
            assert_eq!(overflows, brains.iter().filter(|v| v.is_finite() && v.to_f32().abs() >= 65520.0).count());
        }
    }

    #[test]
    fn gathers_scaled_rows_of_every_dtype() {
        let rows = [1.0, 2.0, 3.0, -4.0, 5.0, -6.0f32];
        let brains = rows.map(bf16::from_f32);
        let halves = rows.map(f16::from_f32);
        let bytes = [1, 2, 3, -4, 5, -6i8];
        let int8 = crate::Int8Weights { values: &bytes, scales: &[1.0, 1.0] };
        let cpu = Cpu::new(Isa::Scalar, 1);
        for weights in
            [WeightsRef::F32(&rows), WeightsRef::Bf16(&brains), WeightsRef::F16(&halves), WeightsRef::Int8(int8)]
        {
            let mut out = [0.0; 6];
            cpu.gather_rows(weights, 3, &[1, 0], 2.0, &mut out);
            assert_eq!(out, [-8.0, 10.0, -12.0, 2.0, 4.0, 6.0]);
        }
    }
}
