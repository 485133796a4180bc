//! A model in memory under a plan that is merged from calibration text.

use mqadapt_checkpoint::Checkpoint;
use mqadapt_core::{Plan, Progress};
use mqadapt_merge::MergeOptions;

use super::layers::CalibratedMerge;
use super::weights::{attention_weights, layer_weights};
use crate::{LoadOptions, Model, Result};

impl Model {
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
    ) -> Result<Self> {
        let unchanged = LoadOptions { plan: None, ..options.clone() };
        let model = Self::load(checkpoint, &unchanged, progress)?;
        let Some(plan) = &options.plan else { return Ok(model) };
        model.with_merged_layers(checkpoint, plan, merge, progress)
    }

    /// The same model under a plan for its checkpoint, merged from calibration text; what does not change is shared.
    ///
    /// # Errors
    /// As [`Model::with_plan`] and [`CalibratedMerge::merge_layer`].
    pub fn with_merged_layers(
        &self,
        checkpoint: &Checkpoint,
        plan: &Plan,
        merge: &mut CalibratedMerge<'_>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let mut model =
            self.with_plan(checkpoint, &Plan::keep(checkpoint.config()), "mean", &MergeOptions::default())?;
        for layer_idx in plan.changed_layers() {
            let weights = layer_weights(checkpoint, layer_idx)?;
            let heads = plan.layers().get(layer_idx).map_or(0, |choice| choice.num_key_value_heads());
            let merged = merge.merge_layer(layer_idx, heads, &weights, progress)?;
            model = model.with_layer(layer_idx, &attention_weights(&merged.weights, heads))?;
        }
        Ok(model)
    }
}
