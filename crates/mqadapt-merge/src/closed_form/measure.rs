//! The attention-output error of a merged layer, measured on calibration inputs.

use std::collections::BTreeMap;

use mqadapt_core::Progressing;

use crate::Error;
use crate::attention::{attend, project, rotate};
use crate::layer::{LayerGeometry, LayerWeights, check_len};

/// Inputs of one layer and the attention outputs of the original on them.
///
/// A few thousand tokens do: 3 sequences of 512 and one of 2048 for these two
/// target contexts. Not for layers with q/k norm.
pub struct Measurement {
    geometry: LayerGeometry,
    sequences: Vec<(Vec<f32>, Vec<f32>)>,
}

impl Measurement {
    /// `sequences`: inputs of `q_proj`, `k_proj`, `v_proj` (after the input norm),
    /// `[tokens, hidden_size]` each from position 0; their lengths are the target contexts.
    ///
    /// # Errors
    /// [`Error::Shape`] where weights or inputs do not fit, [`Error::Option`]
    /// without sequences or for a layer with q/k norm, [`Error::Interrupted`].
    pub fn new(
        weights: &LayerWeights,
        geometry: &LayerGeometry,
        sequences: Vec<Vec<f32>>,
        progress: &Progressing<'_>,
    ) -> Result<Self, Error> {
        weights.validate(geometry, geometry.num_key_value_heads)?;
        if sequences.iter().all(Vec::is_empty) || geometry.qk_norm {
            return Err(Error::Option("measuring needs calibration inputs and a layer without q/k norm".into()));
        }
        let hidden = geometry.hidden_size;
        let sequences = sequences
            .into_iter()
            .map(|x| {
                check_len("x", x.len(), x.len() / hidden * hidden)?;
                let y = outputs(weights, geometry, geometry.num_key_value_heads, &x, progress)?;
                Ok((x, y))
            })
            .collect::<Result<_, Error>>()?;
        Ok(Self { geometry: geometry.clone(), sequences })
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
        for (x, y) in &self.sequences {
            let merged = outputs(weights, &self.geometry, num_key_value_heads, x, progress)?;
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
pub(crate) fn features(
    weights: &LayerWeights,
    geometry: &LayerGeometry,
    num_key_value_heads: usize,
    x: &[f32],
    progress: &Progressing<'_>,
) -> Result<Vec<f32>, Error> {
    let hidden = geometry.hidden_size;
    let mut q = project(x, &weights.q_proj, weights.q_proj_bias.as_deref(), hidden, progress)?;
    let mut k = project(x, &weights.k_proj, weights.k_proj_bias.as_deref(), hidden, progress)?;
    let v = project(x, &weights.v_proj, weights.v_proj_bias.as_deref(), hidden, progress)?;
    rotate(&mut q, geometry.num_attention_heads, geometry);
    rotate(&mut k, num_key_value_heads, geometry);
    attend(geometry, &q, &k, &v, num_key_value_heads, progress)
}

/// Attention outputs after `o_proj`, `[tokens, hidden_size]`, its bias left out.
pub(crate) fn outputs(
    weights: &LayerWeights,
    geometry: &LayerGeometry,
    num_key_value_heads: usize,
    x: &[f32],
    progress: &Progressing<'_>,
) -> Result<Vec<f32>, Error> {
    let features = features(weights, geometry, num_key_value_heads, x, progress)?;
    project(&features, &weights.o_proj, None, geometry.num_attention_heads * geometry.head_dim, progress)
}
