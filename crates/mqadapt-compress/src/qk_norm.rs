//! RMS norms of queries and keys, head by head. In: projected heads of a sequence; out: the heads normalised, and
//! gradients taken back through the norm.

use rayon::prelude::*;

use crate::Error;
use crate::algebra::count;
use crate::layer::check_len;

/// The norms of queries and keys of a layer that has them: `x / rms(x) * weight`, for each head.
#[derive(Clone, Debug, PartialEq)]
pub struct QkNorm {
    /// `[head_dim]`
    pub q_norm: Vec<f32>,
    /// `[head_dim]`
    pub k_norm: Vec<f32>,
    /// Added to the mean square.
    pub eps: f64,
}

impl QkNorm {
    /// Checks both lengths.
    pub(crate) fn check(&self, head_dim: usize) -> Result<(), Error> {
        [&self.q_norm, &self.k_norm].into_iter().try_for_each(|norm| check_len("q/k norm", norm.len(), head_dim))
    }
}

/// `1 / rms` of a head.
pub(crate) fn inverse_rms(head: &[f32], eps: f64) -> f64 {
    let energy: f64 = head.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    (energy / count(head.len()) + eps).sqrt().recip()
}

/// Normalises every head of every row in place.
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
