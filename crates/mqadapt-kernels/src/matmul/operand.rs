//! Activations in the forms that weights are multiplied with, and which kernel multiplies a tile.

use super::{
    Target, Tile,
    digits::{self, Digits},
    float, int8,
};
#[cfg(target_arch = "x86_64")]
use super::{vdpbf16, vnni};
use crate::{Cpu, Isa, Precision, WeightsRef, scratch, weights::Linear};
use half::bf16;

/// Whether half-precision weights of a tile are widened once, before the product, and not in registers for every few rows. AVX2
/// has registers for three rows, and widening costs it as much as their products do.
fn widens_first(isa: Isa, tile: Tile) -> bool {
    isa == Isa::Avx2 && tile.rows >= 24
}

/// The activations in every form that the weights of a call need.
pub(crate) struct Operand<'a> {
    k: usize,
    /// As given, or a copy: rows are `exact_stride` apart.
    exact: &'a [f32],
    exact_stride: usize,
    /// Rounded to `bf16`, in `f32`; empty where no weight needs it.
    rounded: &'a [f32],
    /// Rounded to `bf16`, rows padded with zeros; empty where no weight needs it.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    half: &'a [bf16],
    /// Values between rows of `rounded` and of `half`.
    stride: usize,
    /// As integers; empty where no weight needs it.
    quantised: Digits<'a>,
}

/// Which form of the activations a weight is multiplied with.
#[derive(PartialEq)]
enum Form {
    Exact,
    Rounded,
    Half,
    Quantised,
}

impl Form {
    fn new(isa: Isa, precision: Precision, weight: &WeightsRef<'_>) -> Self {
        match (precision, weight) {
            (Precision::Exact, _) | (_, WeightsRef::F32(_) | WeightsRef::F16(_)) => Self::Exact,
            (_, WeightsRef::Bf16(_)) if isa == Isa::Avx512Bf16 => Self::Half,
            (_, WeightsRef::Bf16(_)) => Self::Rounded,
            (_, WeightsRef::Int8(_)) => Self::Quantised,
        }
    }
}

/// Values between rows of a copy of activations: whole vectors, and never so that rows share the sets of a cache.
fn copy_stride(k: usize) -> usize {
    let stride = k.next_multiple_of(32);
    if stride.is_multiple_of(256) { stride + 32 } else { stride }
}

impl Operand<'_> {
    pub(crate) fn prepare<'w>(
        cpu: &Cpu,
        x: &[f32],
        m: usize,
        k: usize,
        precision: Precision,
        weights: &(impl Iterator<Item = WeightsRef<'w>> + Clone),
        body: impl FnOnce(&Operand<'_>),
    ) {
        let needs = |form| weights.clone().any(|weight| Form::new(cpu.isa, precision, &weight) == form);
        let stride = copy_stride(k);
        let room = |needed: bool| if needed { m * stride } else { 0 };
        // Rows of activations a multiple of 1 KB apart fall into few sets of the first cache; a copy is soon paid back.
        let copies = needs(Form::Exact) && m >= 16 && k.is_multiple_of(256);
        let quantise = if needs(Form::Quantised) { m } else { 0 };
        scratch::with(room(copies), |copy: &mut [f32]| {
            scratch::with(room(needs(Form::Rounded)), |rounded: &mut [f32]| {
                scratch::with(room(needs(Form::Half)), |half: &mut [bf16]| {
                    digits::with(cpu, &x[..quantise * k], k, |quantised| {
                        if copies {
                            cpu.each_row(x, k, copy, stride, |from, to| to[..k].copy_from_slice(from));
                        }
                        if !rounded.is_empty() {
                            cpu.each_row(x, k, rounded, stride, crate::convert::round_to_bf16);
                        }
                        if !half.is_empty() {
                            cpu.each_row(x, k, half, stride, |from, to| {
                                let (values, padding) = to.split_at_mut(from.len());
                                crate::convert::bf16_from_f32(cpu.isa, from, values);
                                padding.fill(bf16::ZERO);
                            });
                        }
                        let (exact, exact_stride) = if copies { (&*copy, stride) } else { (x, k) };
                        body(&Operand { k, exact, exact_stride, rounded, half, stride, quantised });
                    });
                });
            });
        });
    }

    /// Computes `tile` of the product with `linear`.
    ///
    /// # Safety
    /// The tile lies within `[m, n]`, `linear` is `[n, k]`, and `to` has room for the tile.
    pub(crate) unsafe fn multiply(&self, isa: Isa, linear: &Linear<'_>, tile: Tile, to: Target) {
        let k = self.k;
        let as_given = !matches!(linear.weight, WeightsRef::Bf16(_)) || self.rounded.is_empty();
        let (x, stride) = if as_given { (self.exact, self.exact_stride) } else { (self.rounded, self.stride) };
        let bias = linear.bias.map(|bias| &bias[tile.column..][..tile.columns]);
        let x = x[tile.row * stride..][..(tile.rows - 1) * stride + k].as_ptr();
        let (first, len) = (tile.column * k, tile.columns * k);
        // SAFETY: `x` has the tile's rows, the weights from `first` on its columns, by the slicing here and above.
        unsafe {
            match linear.weight {
                #[cfg(target_arch = "x86_64")]
                WeightsRef::Bf16(weight) if !self.half.is_empty() => {
                    let x = self.half[tile.row * self.stride..][..tile.rows * self.stride].as_ptr();
                    vdpbf16::block(x, self.stride, weight[first..][..len].as_ptr(), k, tile, bias, to);
                }
                WeightsRef::F32(w) => float::block(isa, x, stride, w[first..][..len].as_ptr(), None, k, tile, bias, to),
                WeightsRef::F16(w) if widens_first(isa, tile) => scratch::with(len, |wide: &mut [f32]| {
                    crate::convert::f32_from_f16(isa, &w[first..][..len], wide);
                    float::block(isa, x, stride, wide.as_ptr(), None, k, tile, bias, to);
                }),
                WeightsRef::Bf16(w) if widens_first(isa, tile) => scratch::with(len, |wide: &mut [f32]| {
                    crate::convert::f32_from_bf16(isa, &w[first..][..len], wide);
                    float::block(isa, x, stride, wide.as_ptr(), None, k, tile, bias, to);
                }),
                WeightsRef::F16(w) => float::block(isa, x, stride, w[first..][..len].as_ptr(), None, k, tile, bias, to),
                WeightsRef::Bf16(w) => {
                    float::block(isa, x, stride, w[first..][..len].as_ptr(), None, k, tile, bias, to);
                }
                WeightsRef::Int8(w) => {
                    let (w, rows) = (w.columns(tile.column, tile.columns, k), self.quantised);
                    if rows.is_empty() {
                        float::block(isa, x, stride, w.values.as_ptr(), Some(w.scales), k, tile, bias, to);
                        return;
                    }
                    let rows = rows.skip(tile.row);
                    match isa {
                        #[cfg(target_arch = "x86_64")]
                        Isa::Avx512Bf16 => vnni::block(rows, w, k, tile, bias, to),
                        _ => int8::block(isa, rows, w, k, tile, bias, to),
                    }
                }
            }
        }
    }
}
