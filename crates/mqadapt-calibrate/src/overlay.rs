//! A model in memory under a plan that is merged from calibration text.

use mqadapt_checkpoint::Checkpoint;
use mqadapt_compress::MergeOptions;
use mqadapt_core::{Plan, Progress};

use crate::Result;
use crate::merge::CalibratedMerge;
use crate::weights::layer_weights;
use mqadapt_model::{LoadOptions, Model};

/// Loads a checkpoint and applies the plan in the options by a method that needs calibration text: the logits of the
/// checkpoint that the same merge converts. Progress: bytes, then layers.
///
/// # Errors
/// As [`Model::load`] and [`CalibratedMerge::merge_layer`].
pub fn load_calibrated(
    checkpoint: &Checkpoint,
    options: &LoadOptions,
    merge: &mut CalibratedMerge<'_>,
    progress: &dyn Progress,
) -> Result<Model> {
    let unchanged = LoadOptions { plan: options.plan.as_ref().map(Plan::unmerged), ..options.clone() };
    let model = Model::load(checkpoint, &unchanged, progress)?;
    let Some(plan) = &options.plan else { return Ok(model) };
    with_merged_layers(&model, checkpoint, plan, merge, progress)
}

/// The same model under a plan for its checkpoint, merged from calibration text; what does not change is shared.
///
/// # Errors
/// As [`Model::with_plan`] and [`CalibratedMerge::merge_layer`].
pub fn with_merged_layers(
    model: &Model,
    checkpoint: &Checkpoint,
    plan: &Plan,
    merge: &mut CalibratedMerge<'_>,
    progress: &dyn Progress,
) -> Result<Model> {
    let mut model = model.with_plan(checkpoint, &plan.unmerged(), "mean", &MergeOptions::default())?;
    for layer_idx in plan.changed_layers() {
        let weights = layer_weights(checkpoint, layer_idx)?;
        let Some(&cache) = plan.layers().get(layer_idx) else { continue };
        let merged = merge.merge_layer(layer_idx, cache, &weights, progress)?;
        model = model.with_layer(layer_idx, cache, &merged.weights)?;
    }
    Ok(model)
}
