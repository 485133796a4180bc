//! Weight matrices as they are stored, and how precisely they are multiplied.

use half::{bf16, f16};

/// How activations enter a product with half-width operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// Activations stay `f32`; weights and cached K/V are widened exactly; products and sums are `f32`.
    #[default]
    Exact,
    /// Activations are rounded to `bf16` where the weight is `bf16`; products are exact and sums `f32`. Where it is
    /// `int8`, they are rounded to integers of 8 bits, large ones of 16, with one scale a row; products and sums are
    /// exact. `f32` and `f16` weights are treated as in [`Precision::Exact`]. Of attention,
    /// [`AttentionParams::precision`](crate::AttentionParams::precision) tells.
    Fast,
}

/// A borrowed weight matrix `[n, k]`, row-major: one row per output feature.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum WeightsRef<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
    /// Symmetric 8-bit integers with `f32` scales.
    Int8(Int8Weights<'a>),
}

/// Symmetric 8-bit weights `[n, k]`: `value = scale[row] * q`.
#[derive(Debug, Clone, Copy)]
pub struct Int8Weights<'a> {
    /// Quantised values `[n, k]` in `-127..=127`.
    pub values: &'a [i8],
    /// Scales `[n]`.
    pub scales: &'a [f32],
}

impl WeightsRef<'_> {
    /// Number of weights, `n * k`.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::Bf16(values) => values.len(),
            Self::Int8(weights) => weights.values.len(),
        }
    }

    /// Whether there are no weights.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that a product with the whole matrix reads.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(values) => size_of_val(*values),
            Self::F16(values) => size_of_val(*values),
            Self::Bf16(values) => size_of_val(*values),
            Self::Int8(weights) => size_of_val(weights.values) + size_of_val(weights.scales),
        }
    }

    /// Rows `n` of the matrix `[n, k]`.
    ///
    /// # Panics
    /// If the weights are no such matrix.
    #[must_use]
    pub fn rows(&self, k: usize) -> usize {
        assert!(k > 0 && self.len().is_multiple_of(k), "{} weights do not make rows of {k}", self.len());
        let n = self.len() / k;
        if let Self::Int8(weights) = self {
            assert_eq!(weights.scales.len(), n, "scales are [{n}]");
        }
        n
    }
}

impl Int8Weights<'_> {
    /// Some of its rows of `k`, which are the product's columns.
    pub(crate) fn columns(self, first: usize, count: usize, k: usize) -> Self {
        Self { values: &self.values[first * k..][..count * k], scales: &self.scales[first..][..count] }
    }
}

/// A linear layer: weights `[n, k]` and, in some families, a bias `[n]`.
#[derive(Debug, Clone, Copy)]
pub struct Linear<'a> {
    /// Weights `[n, k]`.
    pub weight: WeightsRef<'a>,
    /// Added to every row of the product.
    pub bias: Option<&'a [f32]>,
}

impl<'a> From<WeightsRef<'a>> for Linear<'a> {
    fn from(weight: WeightsRef<'a>) -> Self {
        Self { weight, bias: None }
    }
}

impl Linear<'_> {
    /// Output features, for `k` input features.
    pub(crate) fn rows(&self, k: usize) -> usize {
        let n = self.weight.rows(k);
        if let Some(bias) = self.bias {
            assert_eq!(bias.len(), n, "bias is [{n}]");
        }
        n
    }
}

/// Borrowed floats in a stored dtype.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum FloatsRef<'a> {
    /// 32-bit floats.
    F32(&'a [f32]),
    /// IEEE half precision.
    F16(&'a [f16]),
    /// bfloat16.
    Bf16(&'a [bf16]),
}

/// Mutably borrowed floats in a stored dtype.
#[derive(Debug)]
#[non_exhaustive]
pub enum FloatsMut<'a> {
    /// 32-bit floats.
    F32(&'a mut [f32]),
    /// IEEE half precision.
    F16(&'a mut [f16]),
    /// bfloat16.
    Bf16(&'a mut [bf16]),
}

impl FloatsRef<'_> {
    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F16(values) => values.len(),
            Self::Bf16(values) => values.len(),
        }
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl FloatsMut<'_> {
    /// Number of values.
    #[must_use]
    pub fn len(&self) -> usize {
        self.as_ref().len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The same values, shared.
    #[must_use]
    pub fn as_ref(&self) -> FloatsRef<'_> {
        match self {
            Self::F32(values) => FloatsRef::F32(values),
            Self::F16(values) => FloatsRef::F16(values),
            Self::Bf16(values) => FloatsRef::Bf16(values),
        }
    }
}
