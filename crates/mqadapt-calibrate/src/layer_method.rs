//! Methods that merge from calibration text, as a conversion calls them.

use mqadapt_compress::{LayerError, LayerMethod, LayerWeights, MergedLayer};
use mqadapt_core::{LayerCache, Progress};
use serde_json::{Value, json};

use crate::{CalibratedLayer, CalibratedMerge, Error};

/// A [`CalibratedMerge`] as a [`LayerMethod`].
pub struct CalibratedLayers<'a> {
    merge: CalibratedMerge<'a>,
    progress: &'a dyn Progress,
}

impl<'a> CalibratedLayers<'a> {
    /// Progress: layers of the model, phase `calibrate`.
    #[must_use]
    pub fn new(merge: CalibratedMerge<'a>, progress: &'a dyn Progress) -> Self {
        Self { merge, progress }
    }
}

impl LayerMethod for CalibratedLayers<'_> {
    fn merge_layer(
        &mut self,
        layer_idx: usize,
        cache: LayerCache,
        weights: &LayerWeights,
    ) -> Result<MergedLayer, LayerError> {
        let merged = self.merge.merge_layer(layer_idx, cache, weights, self.progress).map_err(failed)?;
        let (relative_error, notes) = (relative_error(&merged), notes(&merged));
        Ok(MergedLayer { weights: merged.weights, relative_error, notes })
    }

    fn resume_layer(&mut self, layer_idx: usize, cache: LayerCache, weights: &LayerWeights) -> Result<(), LayerError> {
        self.merge.resume_layer(layer_idx, cache, weights, self.progress).map_err(failed)
    }
}

fn failed(error: Error) -> LayerError {
    match error {
        Error::Interrupted(interrupted) => LayerError::Interrupted(interrupted),
        error => LayerError::Refused(error.to_string()),
    }
}

/// Relative error of the attention output: as measured by the refit, else as the statistics predict it.
fn relative_error(merged: &CalibratedLayer) -> f64 {
    merged.refit.map_or(merged.report.output_error, |(_, after)| after)
}

/// What the manifest says of a layer.
fn notes(merged: &CalibratedLayer) -> Value {
    let report = &merged.report;
    if let Some(kept) = &report.kept {
        return json!({ "kept_heads": kept });
    }
    let mut notes = json!({
        "predicted_output_error": digits(report.output_error),
        "predicted_logit_error": report.logit_error.map(digits),
        "fast_pairs": report.cut,
    });
    let mut add = |name: &str, value: Value| notes[name] = value;
    if !report.measured.is_empty() {
        add("measured_output_error", report.measured.iter().map(|(cut, error)| json!([cut, digits(*error)])).collect());
    }
    if !report.compared.is_empty() {
        let compared =
            report.compared.iter().map(|(solution, error)| (solution.name().to_owned(), json!(digits(*error))));
        add("compared_output_error", Value::Object(compared.collect()));
    }
    if let Some(order) = &report.regrouped {
        add("key_value_heads_in_group_order", json!(order));
    }
    if !report.fallbacks.is_empty() {
        add("fallbacks", report.fallbacks.iter().map(|fallback| json!(fallback.describe())).collect());
    }
    if let Some((before, after)) = merged.refit {
        add("output_error_before_refit", json!(digits(before)));
        add("output_error_after_refit", json!(digits(after)));
    }
    notes
}

/// Six digits: as many as mean something, and no more than a journal gives back exactly.
fn digits(error: f64) -> f64 {
    format!("{error:.5e}").parse().unwrap_or(error)
}
