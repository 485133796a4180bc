//! The refit of a merged layer on its converted stream: the sums of it, for one solution or another.

use mqadapt_core::{DType, Progress};
use mqadapt_merge::{LayerGeometry, LayerWeights, Refit};

use super::weights::attention_weights;
use crate::activations::Activations;
use crate::stream::StreamedLayer;
use crate::{Error, Result};

/// A layer whose merge is compared with the original.
pub(super) struct Refitting<'a> {
    pub(super) layer: &'a StreamedLayer,
    pub(super) geometry: &'a LayerGeometry,
    pub(super) original: &'a LayerWeights,
    /// K/V heads of the merged layer.
    pub(super) heads: usize,
    /// Type that its weights will be written in.
    pub(super) dtype: DType,
}

impl Refitting<'_> {
    /// The sums for merged `weights` on the converted `stream`. `attention`: what the original `o_proj` read on the original
    /// stream. What the merged one reads goes to `kept`, or else in the place of that.
    pub(super) fn sums(
        &self,
        weights: &LayerWeights,
        stream: &Activations,
        attention: &mut Activations,
        mut kept: Option<&mut Activations>,
        progress: &dyn Progress,
    ) -> Result<Refit> {
        let failed = Error::merge(self.layer.layer_idx());
        let progressing = self.layer.progressing(progress);
        let features = self.geometry.num_attention_heads * self.geometry.head_dim;
        let mut sums = Refit::new(&weights.o_proj, &self.original.o_proj, features, self.geometry.hidden_size)
            .and_then(|sums| sums.bounded_by(&weights.v_proj, self.geometry.head_dim))
            .map_err(failed)?;
        let converted = self.layer.with_attention(&attention_weights(weights, self.heads), self.dtype)?;
        let mut add = |trace: &crate::LayerTrace<'_>| {
            sums.add_sequence(trace.attention, &attention.read(trace.sequence)?, &progressing).map_err(failed)?;
            let to = kept.as_deref_mut().unwrap_or(&mut *attention);
            to.write(trace.sequence, trace.attention.to_vec())
        };
        converted.look(stream, &mut add, progress)?;
        Ok(sums)
    }
}
