//! The attention-output error of a merged layer, measured on calibration inputs.

use std::collections::BTreeMap;

use mqadapt_core::Progressing;

use crate::Error;
use crate::attention::{attend, project, rotate};
use crate::layer::{LayerWeights, check_len};
use crate::qk_norm::{QkNorm, normalise};
use crate::refine::Target;
use mqadapt_core::AttentionShape;

/// Inputs of one layer and the attention outputs of the original on them.
///
/// A few thousand tokens do: 3 sequences of 512 and one of 2048 for these two
/// target contexts.
pub struct Measurement {
    geometry: AttentionShape,
    norms: Option<QkNorm>,
    sequences: Vec<Target>,
}

impl Measurement {
    /// `sequences`: inputs of `q_proj`, `k_proj`, `v_proj` (after the input norm),
    /// `[tokens, hidden_size]` each from position 0; their lengths are the target contexts.
    /// `norms` of a layer with q/k norm.
    ///
    /// # Errors
    /// [`Error::Shape`] where weights or inputs do not fit, [`Error::Option`]
    /// without sequences, or where q/k norms are missing, [`Error::Interrupted`].
    pub fn new(
        weights: &LayerWeights,
        geometry: &AttentionShape,
        norms: Option<QkNorm>,
        sequences: Vec<Vec<f32>>,
        progress: &Progressing<'_>,
    ) -> Result<Self, Error> {
        weights.validate(geometry, geometry.num_key_value_heads)?;
        if sequences.iter().all(Vec::is_empty) || geometry.qk_norm != norms.is_some() {
            return Err(Error::Option(
                "measuring needs calibration inputs, and the norms of a layer with q/k norm".into(),
            ));
        }
        norms.iter().try_for_each(|norms| norms.check(weights, geometry))?;
        let hidden = geometry.hidden_size;
        let sequences = sequences
            .into_iter()
            .map(|x| {
                check_len("x", x.len(), x.len() / hidden * hidden)?;
                let y = normed_outputs(weights, geometry, norms.as_ref(), geometry.num_key_value_heads, &x, progress)?;
                Ok(Target { x, y })
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self { geometry: geometry.clone(), norms, sequences })
    }

    /// The norms of queries and keys, where the layer has them.
    pub(crate) fn norms(&self) -> Option<&QkNorm> {
        self.norms.as_ref()
    }

    /// Inputs and the original's attention outputs.
    pub(crate) fn targets(&self) -> &[Target] {
        &self.sequences
    }

    /// Relative error of the attention output of `weights` with
    /// `num_key_value_heads` K/V heads: `|Y' - Y| / |Y|` over all sequences of a
    /// length, then the mean over lengths.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub fn relative_error(
        &self,
        weights: &LayerWeights,
        num_key_value_heads: usize,
        progress: &Progressing<'_>,
    ) -> Result<f64, Error> {
        let mut by_length: BTreeMap<usize, (f64, f64)> = BTreeMap::new();
        for Target { x, y } in &self.sequences {
            let norms = self.norms.as_ref();
            let merged = normed_outputs(weights, &self.geometry, norms, num_key_value_heads, x, progress)?;
            let (error, energy) = by_length.entry(x.len()).or_default();
            for (a, b) in y.iter().zip(&merged) {
                *error += f64::from(a - b) * f64::from(a - b);
                *energy += f64::from(*a) * f64::from(*a);
            }
        }
        let errors: Vec<f64> = by_length.values().map(|(e, t)| if *t > 0.0 { (e / t).sqrt() } else { 0.0 }).collect();
        Ok(errors.iter().sum::<f64>() / crate::algebra::count(errors.len()))
    }
}

/// Attention outputs before `o_proj`, `[tokens, num_attention_heads * head_dim]`.
fn normed_features(
    weights: &LayerWeights,
    geometry: &AttentionShape,
    norms: Option<&QkNorm>,
    num_key_value_heads: usize,
    x: &[f32],
    progress: &Progressing<'_>,
) -> Result<Vec<f32>, Error> {
    let hidden = geometry.hidden_size;
    let mut q = project(x, &weights.q_proj, weights.q_proj_bias.as_deref(), hidden, progress)?;
    let mut k = project(x, &weights.k_proj, weights.k_proj_bias.as_deref(), hidden, progress)?;
    let v = project(x, &weights.v_proj, weights.v_proj_bias.as_deref(), hidden, progress)?;
    if let Some(norms) = norms {
        normalise(&mut q, &norms.q_norm, norms.eps);
        normalise(&mut k, norms.of_keys(weights), norms.eps);
    }
    rotate(&mut q, geometry.num_attention_heads, geometry);
    rotate(&mut k, num_key_value_heads, geometry);
    attend(geometry, &q, &k, &v, num_key_value_heads, progress)
}

/// Attention outputs after `o_proj`, `[tokens, hidden_size]`, its bias left out.
fn normed_outputs(
    weights: &LayerWeights,
    geometry: &AttentionShape,
    norms: Option<&QkNorm>,
    num_key_value_heads: usize,
    x: &[f32],
    progress: &Progressing<'_>,
) -> Result<Vec<f32>, Error> {
    let features = normed_features(weights, geometry, norms, num_key_value_heads, x, progress)?;
    project(&features, &weights.o_proj, None, geometry.num_attention_heads * geometry.head_dim, progress)
}

/// [`normed_features`] of a layer without norms.
#[cfg(test)]
pub(crate) fn features(
    weights: &LayerWeights,
    geometry: &AttentionShape,
    num_key_value_heads: usize,
    x: &[f32],
    progress: &Progressing<'_>,
) -> Result<Vec<f32>, Error> {
    normed_features(weights, geometry, None, num_key_value_heads, x, progress)
}

/// [`normed_outputs`] of a layer without norms.
#[cfg(test)]
pub(crate) fn outputs(
    weights: &LayerWeights,
    geometry: &AttentionShape,
    num_key_value_heads: usize,
    x: &[f32],
    progress: &Progressing<'_>,
) -> Result<Vec<f32>, Error> {
    normed_outputs(weights, geometry, None, num_key_value_heads, x, progress)
}
