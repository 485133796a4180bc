//! The architectures that are read. In: the name in `general.architecture`. Out: what its tensors are called, how they are
//! stored, and the fields of `config.json` that it does not share with the others.
//!
//! Keys and layouts are those of llama.cpp's `convert_hf_to_gguf.py` and `llama-model.cpp`, fields those of transformers'
//! `configuration_*.py`.

mod gemma;
mod gpt2;
mod llama;
mod modules;
mod phi3;
mod qwen;

use mqadapt_core::family::Module;
use serde_json::{Map, Value};

use super::described::Model;
use super::metadata::Metadata;
use super::problem::{Parsed, Problem};

/// A module's name in a GGUF file, and the modules whose rows its tensor holds, in their order.
pub(super) type StoredModule = (&'static str, &'static [Module]);

/// An architecture of llama.cpp.
#[derive(Debug)]
pub(super) struct Architecture {
    /// In `general.architecture`, and at the beginning of its keys.
    pub name: &'static str,
    /// `model_type` of the Hugging Face configuration.
    pub model_type: &'static str,
    /// The class in transformers.
    pub class: &'static str,
    /// The modules of a layer, in groups that architectures share.
    pub modules: &'static [&'static [StoredModule]],
    /// The converter puts the rows of queries and keys in the order of `RoPE`'s pairs (`LlamaModel.permute`).
    pub permuted: bool,
    /// The converter adds 1 to the weights of norms, by which Gemma's forward pass multiplies.
    pub norm_plus_one: bool,
    /// A head may have more values than are rotated, so that `rope.dimension_count` does not give `head_dim`.
    pub partly_rotated: bool,
    /// The key of what a norm adds to the variance.
    pub norm_eps: &'static str,
    /// The fields of `config.json` that are its own, those of `RoPE` among them; `null` takes away what the others share.
    /// Names are Llama's where the family has others.
    pub fields: fn(&Model) -> Parsed<Map<String, Value>>,
}

impl Architecture {
    /// Every module that a layer can have.
    pub(super) fn stored_modules(&self) -> impl Iterator<Item = &'static StoredModule> + use<> {
        self.modules.iter().copied().flatten()
    }
}

/// Where an architecture with RMS norms has what they add.
pub(super) const RMS_NORM_EPS: &str = "attention.layer_norm_rms_epsilon";

/// All that are read.
pub(super) static ARCHITECTURES: &[&Architecture] = &[
    &llama::LLAMA,
    &qwen::QWEN2,
    &qwen::QWEN3,
    &gemma::GEMMA,
    &gemma::GEMMA2,
    &gemma::GEMMA3,
    &phi3::PHI3,
    &gpt2::GPT2,
];

/// The architecture of a file. Refuses others, and models that share a name but not the forward pass or the layout.
pub(super) fn of(metadata: &Metadata) -> Parsed<&'static Architecture> {
    let key = "general.architecture";
    let name = metadata.text(key)?.ok_or_else(|| Problem::missing_key(key))?;
    let Some(&architecture) = ARCHITECTURES.iter().find(|architecture| architecture.name == name) else {
        let known: Vec<_> = ARCHITECTURES.iter().map(|architecture| architecture.name).collect();
        return Err(Problem::key(key, format!("is '{}'; supported are {}", name.escape_debug(), known.join(", "))));
    };
    let key = format!("{name}.expert_count");
    if metadata.integer(&key)?.unwrap_or_default() > 0 {
        return Err(Problem::key(&key, "says a mixture of experts, which is not supported"));
    }
    let key = "split.count";
    if metadata.integer(key)?.unwrap_or_default() > 1 {
        return Err(Problem::key(key, "says one of several files; join them with llama-gguf-split --merge"));
    }
    Ok(architecture)
}
