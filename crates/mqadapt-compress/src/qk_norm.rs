//! RMS norms of queries and keys, head by head or over all heads. In: projected heads of a sequence; out: the heads
//! normalised, and gradients taken back through the norm.

use rayon::prelude::*;

use crate::Error;
use crate::algebra::count;
use crate::layer::{LayerWeights, check_len, round};
use mqadapt_core::AttentionShape;

/// The norms of queries and keys of a layer that has them: `x / rms(x) * weight`, for each head, or for all heads together.
#[derive(Clone, Debug, PartialEq)]
pub struct QkNorm {
    /// `[head_dim]`, or `[num_attention_heads * head_dim]`
    pub q_norm: Vec<f32>,
    /// `[head_dim]`, or `[num_key_value_heads * head_dim]` of the source; [`LayerWeights::k_norm`] takes its place
    pub k_norm: Vec<f32>,
    /// Added to the mean square.
    pub eps: f64,
}

impl QkNorm {
    /// Checks both lengths.
    pub(crate) fn check(&self, weights: &LayerWeights, geometry: &AttentionShape) -> Result<(), Error> {
        let heads = |heads: usize| if weights.k_norm.is_some() { heads } else { 1 };
        let (q, k) = (heads(geometry.num_attention_heads), heads(geometry.num_key_value_heads));
        check_len("q_norm", self.q_norm.len(), q * geometry.head_dim)?;
        check_len("k_norm", self.k_norm.len(), k * geometry.head_dim)
    }

    /// The weight of the norm of keys in a layer of these weights.
    pub(crate) fn of_keys<'a>(&'a self, weights: &'a LayerWeights) -> &'a [f32] {
        weights.k_norm.as_deref().unwrap_or(&self.k_norm)
    }
}

/// `1 / rms` of what is normalised together: a head, or the heads of a row.
pub(crate) fn inverse_rms(head: &[f32], eps: f64) -> f64 {
    let energy: f64 = head.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    (energy / count(head.len()) + eps).sqrt().recip()
}

/// Normalises every run of `weight`'s length in place.
pub(crate) fn normalise(x: &mut [f32], weight: &[f32], eps: f64) {
    x.par_chunks_exact_mut(weight.len()).for_each(|head| {
        let scale = inverse_rms(head, eps) as f32;
        head.iter_mut().zip(weight).for_each(|(v, w)| *v = *v * scale * w);
    });
}

/// The gradient by normalised heads, in place to the one by the heads `x` before the norm.
pub(crate) fn normalise_back(by: &mut [f32], x: &[f32], weight: &[f32], eps: f64) {
    let d = weight.len();
    by.par_chunks_exact_mut(d).zip(x.par_chunks_exact(d)).for_each(|(by, head)| {
        let scale = inverse_rms(head, eps);
        by.iter_mut().zip(weight).for_each(|(b, w)| *b *= w);
        let along: f64 = by.iter().zip(head).map(|(b, v)| f64::from(*b) * f64::from(*v)).sum();
        let (shrink, scale) = ((along * scale.powi(3) / count(d)) as f32, scale as f32);
        by.iter_mut().zip(head).for_each(|(b, v)| *b = *b * scale - v * shrink);
    });
}

/// The gradient by the weight of the norm, from that by the normalised heads; `x`: before the norm.
pub(crate) fn by_weight(by: &[f32], x: &[f32], width: usize, eps: f64) -> Vec<f32> {
    let mut sums = vec![0.0f64; width];
    for (by, x) in by.chunks_exact(width).zip(x.chunks_exact(width)) {
        let scale = inverse_rms(x, eps);
        sums.iter_mut().zip(by).zip(x).for_each(|((sum, by), x)| *sum += f64::from(*by) * f64::from(*x) * scale);
    }
    sums.into_iter().map(round).collect()
}
