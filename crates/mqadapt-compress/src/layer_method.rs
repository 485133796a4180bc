//! A method that needs the whole attention of a layer, as a conversion calls it. In: a layer's weights and what it is to cache;
//! out: the new weights, the shape that they have, and what the method says of them.

use mqadapt_core::{Interrupted, LayerCache};
use serde_json::Value;

use crate::LayerWeights;

/// A layer's merged weights.
#[derive(Debug, Clone, Default)]
pub struct MergedLayer {
    /// The same tensors as were given, in the shapes of the plan.
    pub weights: LayerWeights,
    /// How far the layer is from the source's, as the method measures it.
    pub relative_error: f64,
    /// What the method has to say of this layer (predicted errors, fallbacks); goes into the manifest's `layers`.
    pub notes: Value,
}

/// Why a layer is not merged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerError {
    /// The user asked to stop.
    Interrupted(Interrupted),
    /// The method cannot, in words.
    Refused(String),
}

impl From<Interrupted> for LayerError {
    fn from(interrupted: Interrupted) -> Self {
        Self::Interrupted(interrupted)
    }
}

impl From<String> for LayerError {
    fn from(detail: String) -> Self {
        Self::Refused(detail)
    }
}

/// A method that needs `q_proj`, `k_proj`, `v_proj` and `o_proj` of a layer together, and gives all of them back.
///
/// A conversion calls it for each layer that the plan changes, from the first to the last, before it streams the rest: one
/// layer's weights are in memory at a time. A resumed conversion shows it the layers that are in their places already, and
/// calls it for the others, so equal calls must give equal weights.
pub trait LayerMethod {
    /// Merges one layer into what `cache` asks for.
    ///
    /// # Errors
    /// Why it cannot, or that it was interrupted.
    fn merge_layer(
        &mut self,
        layer_idx: usize,
        cache: LayerCache,
        weights: &LayerWeights,
    ) -> Result<MergedLayer, LayerError>;

    /// Takes note of a layer that an earlier run merged: `weights` as they were stored. For methods of which a layer depends
    /// on those before it; the others need not know.
    ///
    /// # Errors
    /// As [`Self::merge_layer`].
    fn resume_layer(
        &mut self,
        _layer_idx: usize,
        _cache: LayerCache,
        _weights: &LayerWeights,
    ) -> Result<(), LayerError> {
        Ok(())
    }
}
