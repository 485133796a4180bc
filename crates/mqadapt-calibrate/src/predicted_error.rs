//! What a merge will cost a layer, by saved statistics alone: no forward pass, and for most methods no merge either.

use mqadapt_checkpoint::Checkpoint;
use mqadapt_compress::closed_form::predicted_error;
use mqadapt_compress::{LayerWeights, METHODS, Method, Prediction};
use mqadapt_core::{LayerCache, NoProgress, Progress};

use crate::calibration::Calibration;
use crate::merge::CalibratedMerge;
use crate::statistics_file::StatisticsFile;
use crate::weights::{attention, layer_weights};
use crate::{CalibrationOptions, Error, Result};

/// The error of a layer at a number of K/V heads, given its weights.
type Predict<'a> = dyn FnMut(usize, usize, &LayerWeights) -> Result<f64> + 'a;

/// Relative error of the attention output of some layers, each at its number of K/V heads while the rest of the model is
/// unchanged.
///
/// `contexts`: tokens that the result is for. Where the method has to merge the layers, it does with `options` (not refitted).
///
/// # Errors
/// [`Error::Argument`] for a method whose result does not follow from statistics; as
/// [`CalibratedMerge::merge_layer`] otherwise.
pub fn predicted_errors(
    checkpoint: &Checkpoint,
    saved: StatisticsFile,
    method: &'static Method,
    options: &CalibrationOptions,
    contexts: &[usize],
    layers: &[(usize, usize)],
    progress: &dyn Progress,
) -> Result<Vec<f64>> {
    let none = || {
        let known: Vec<_> = METHODS.iter().filter(|m| m.prediction.is_some()).map(|method| method.name).collect();
        let detail = format!("'{}' has no prediction: expected one of {}", method.name, known.join(", "));
        Error::Argument { name: "method", detail }
    };
    let prediction = method.prediction.ok_or_else(none)?;
    saved.check_model(&checkpoint.fingerprint()?)?;
    let text = Calibration { sequences: Vec::new(), target_contexts: contexts.to_vec() };
    text.check_target_contexts(&saved.lengths())?;
    let mut error: Box<Predict<'_>> = if let Prediction::Fixed(fixed) = prediction {
        let context = contexts.iter().copied().max().unwrap_or(1);
        Box::new(move |layer_idx, heads, weights| {
            let geometry = attention(checkpoint.config(), layer_idx)?;
            saved.check_weights(checkpoint, layer_idx, progress)?;
            let sample = saved.layer(layer_idx, &geometry)?;
            predicted_error(weights, &geometry, heads, &sample.statistics, fixed, context)
                .map_err(Error::merge(layer_idx))
        })
    } else {
        let options = CalibrationOptions { sequential: false, refine: None, ..*options };
        let mut merge = CalibratedMerge::new(checkpoint, text, method, options, Some(saved), checkpoint.dtype())?;
        Box::new(move |layer_idx, heads, weights| {
            Ok(merge.merge_layer(layer_idx, LayerCache::heads(heads), weights, &NoProgress)?.report.output_error)
        })
    };
    let total = layers.len() as u64;
    let predict = |(done, &(layer_idx, heads)): (usize, &(usize, usize))| {
        if layer_idx >= checkpoint.config().num_hidden_layers {
            let detail = format!("must be layers of the model; it has no layer {layer_idx}");
            return Err(Error::Argument { name: "layers", detail });
        }
        progress.advance("layers", done as u64, total)?;
        error(layer_idx, heads, &layer_weights(checkpoint, layer_idx)?)
    };
    layers.iter().enumerate().map(predict).collect()
}
