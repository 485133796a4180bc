//! Gradient steps on a merged layer: its inputs on the converted stream, its wanted outputs on the original one.

use mqadapt_compress::{LayerWeights, RefineOptions, Target, refine};
use mqadapt_core::Progress;

use crate::layer_pass::{CalibratedLayer, LayerPass};
use crate::{Error, Result};
use mqadapt_model::Activations;
use mqadapt_model::StreamedLayer;

/// A merged layer after some gradient steps on its converted stream, towards the output of the original.
pub(crate) fn refined(
    layer: &StreamedLayer,
    run: &LayerPass,
    stream: &Activations,
    original: &LayerWeights,
    merged: &CalibratedLayer,
    options: &RefineOptions,
    progress: &dyn Progress,
) -> Result<LayerWeights> {
    let (layer_idx, geometry) = (layer.layer_idx(), &run.geometry);
    let features = geometry.num_attention_heads * geometry.head_dim;
    let progressing = layer.progressing(progress);
    let mut inputs = run.attention.like(geometry.hidden_size)?;
    let mut keep = |trace: &mqadapt_model::LayerTrace<'_>| inputs.write(trace.sequence, trace.attention_input.to_vec());
    layer.look(stream, &mut keep, progress)?;
    let sequences: Vec<usize> =
        (0..stream.lengths().len()).filter(|s| stream.lengths().get(*s).is_some_and(|length| *length > 0)).collect();
    let target = |step: usize| -> std::result::Result<Target, RefineFailed> {
        let sequence = sequences[step % sequences.len()];
        let (x, attention) = (inputs.read(sequence)?.into_owned(), run.attention.read(sequence)?);
        Ok(Target::of_original(x, &attention, &original.o_proj, features, &progressing)?)
    };
    let heads = merged.report.num_key_value_heads;
    refine(&merged.weights, geometry, run.norms.as_ref(), heads, options, &progressing, target).map_err(|error| {
        match error {
            RefineFailed::Reading(error) => error,
            RefineFailed::Merging(source) => Error::merge(layer_idx)(source),
        }
    })
}

/// What can go wrong between the steps, and in them.
enum RefineFailed {
    Reading(Error),
    Merging(mqadapt_compress::Error),
}

impl From<mqadapt_model::Error> for RefineFailed {
    fn from(error: mqadapt_model::Error) -> Self {
        Self::Reading(error.into())
    }
}

impl From<mqadapt_compress::Error> for RefineFailed {
    fn from(error: mqadapt_compress::Error) -> Self {
        Self::Merging(error)
    }
}
