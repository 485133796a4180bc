//! The refit of a merged layer on its converted stream: the sums of it, for one solution or another.

use mqadapt_compress::{LayerWeights, Refit};
use mqadapt_core::{AttentionShape, DType, LayerCache, Progress};

use crate::{Error, Result};
use mqadapt_model::Activations;
use mqadapt_model::StreamedLayer;

/// A layer whose merge is compared with the original.
pub(crate) struct Refitting<'a> {
    pub(crate) layer: &'a StreamedLayer,
    pub(crate) geometry: &'a AttentionShape,
    pub(crate) original: &'a LayerWeights,
    /// What the merged layer caches.
    pub(crate) cache: LayerCache,
    /// Type that its weights will be written in.
    pub(crate) dtype: DType,
}

impl Refitting<'_> {
    /// The sums for merged `weights` on the converted `stream`. `attention`: what the original `o_proj` read on the original
    /// stream. What the merged one reads goes to `kept`, or else in the place of that.
    pub(crate) fn sums(
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
        let converted = self.layer.with_attention(self.cache, weights, self.dtype)?;
        let mut add = |trace: &mqadapt_model::LayerTrace<'_>| -> Result<()> {
            sums.add_sequence(trace.attention, &attention.read(trace.sequence)?, &progressing).map_err(failed)?;
            let to = kept.as_deref_mut().unwrap_or(&mut *attention);
            Ok(to.write(trace.sequence, trace.attention.to_vec())?)
        };
        converted.look(stream, &mut add, progress)?;
        Ok(sums)
    }
}
