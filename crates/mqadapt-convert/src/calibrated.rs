//! Methods that merge from calibration text, as a conversion calls them.

use mqadapt_core::Progress;
use mqadapt_core::family::{LayerTensor, Module};
use mqadapt_model::{CalibratedLayer, CalibratedMerge, Error};
use serde_json::{Value, json};

use crate::{LayerError, LayerMerge, LayerWeights, MergedLayer};

/// A [`CalibratedMerge`] in the place of a [`LayerMerge`].
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

impl LayerMerge for CalibratedLayers<'_> {
    fn merge_layer(
        &mut self,
        layer_idx: usize,
        heads: usize,
        weights: LayerWeights,
    ) -> Result<MergedLayer, LayerError> {
        let name = |module, bias| LayerTensor { layer_idx, module, bias }.name();
        let (source, o_proj_bias) = by_field(layer_idx, weights)?;
        let merged = self.merge.merge_layer(layer_idx, heads, &source, self.progress).map_err(failed)?;
        let (relative_error, notes) = (relative_error(&merged), notes(&merged));
        let new = merged.weights;
        let named = [
            (Module::QProj, false, Some(new.q_proj)),
            (Module::KProj, false, Some(new.k_proj)),
            (Module::VProj, false, Some(new.v_proj)),
            (Module::OProj, false, Some(new.o_proj)),
            (Module::QProj, true, new.q_proj_bias),
            (Module::KProj, true, new.k_proj_bias),
            (Module::VProj, true, new.v_proj_bias),
            (Module::OProj, true, o_proj_bias),
        ];
        let weights =
            named.into_iter().filter_map(|(module, bias, values)| Some((name(module, bias), values?))).collect();
        Ok(MergedLayer { weights, relative_error, notes })
    }

    fn resume_layer(&mut self, layer_idx: usize, heads: usize, weights: LayerWeights) -> Result<(), LayerError> {
        let (stored, _) = by_field(layer_idx, weights)?;
        self.merge.resume_layer(layer_idx, heads, &stored, self.progress).map_err(failed)
    }
}

/// The weights of a layer by their fields, and the bias of `o_proj`, which no merge changes.
fn by_field(
    layer_idx: usize,
    mut weights: LayerWeights,
) -> Result<(mqadapt_merge::LayerWeights, Option<Vec<f32>>), LayerError> {
    let name = |module, bias| LayerTensor { layer_idx, module, bias }.name();
    let mut take = |module, bias| weights.remove(&name(module, bias));
    let mut needed = |module| take(module, false).ok_or_else(|| format!("was not given '{}'", name(module, false)));
    let source = mqadapt_merge::LayerWeights {
        q_proj: needed(Module::QProj)?,
        k_proj: needed(Module::KProj)?,
        v_proj: needed(Module::VProj)?,
        o_proj: needed(Module::OProj)?,
        q_proj_bias: take(Module::QProj, true),
        k_proj_bias: take(Module::KProj, true),
        v_proj_bias: take(Module::VProj, true),
    };
    Ok((source, take(Module::OProj, true)))
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
    if let Some(kept) = &merged.kept {
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
