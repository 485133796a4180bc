//! How a result is written: the names of its tensors, its configuration, and the files beside its weights.
//!
//! A target is one file and one line in [`TARGETS`].

mod hugging_face;

use std::borrow::Cow;

use mqadapt_core::{DType, ModelConfig, Plan};

/// Every target.
pub static TARGETS: &[&dyn Target] = &[&hugging_face::HuggingFace];

/// A layout of checkpoints that some engine reads. Weights are written as safetensors.
pub trait Target: Sync {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// Refuses what the layout cannot hold, with a sentence that says what it can.
    ///
    /// # Errors
    /// That sentence.
    fn check(&self, source: &ModelConfig, plan: &Plan) -> Result<(), String>;

    /// The configuration of the result. `dtype`: of its weights, where it is not the source's.
    fn config(&self, source: &ModelConfig, plan: &Plan, dtype: Option<DType>) -> ModelConfig;

    /// The name in the result's files of the tensor that holds what a Llama's `...ForCausalLM` calls `name`. Tensors that follow
    /// one another under one name become one: their rows, one under the other.
    fn tensor_name<'a>(&self, planned: &ModelConfig, name: &'a str) -> Cow<'a, str>;

    /// The files that the target writes beside weights and the source's other files: names and content, in the order in which
    /// they are written.
    fn files(&self, planned: &ModelConfig) -> Vec<(&'static str, String)>;
}

/// The target of this name.
#[must_use]
pub fn target(name: &str) -> Option<&'static dyn Target> {
    TARGETS.iter().copied().find(|target| target.name() == name)
}
