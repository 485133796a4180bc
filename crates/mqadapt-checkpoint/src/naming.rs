//! Names of tensors: in, those of a checkpoint's files; out, those that a `...ForCausalLM` has, which all other code uses.

use std::collections::HashMap;

use mqadapt_core::ModelConfig;
use mqadapt_core::family::{BASE_MODEL_PREFIX, EMBED_TOKENS, LM_HEAD, LayerTensor, NORM};

use crate::TensorInfo;

/// Gives the tensors of a base model (what `LlamaModel.save_pretrained` writes) their full names, and notes in `config`
/// what the checkpoint stores.
pub(crate) fn adopt(config: &mut ModelConfig, tensors: &mut [TensorInfo]) {
    let full_name = |tensor: &TensorInfo| {
        let name = format!("{BASE_MODEL_PREFIX}{}", tensor.name);
        (name == EMBED_TOKENS || name == NORM || LayerTensor::parse(&name).is_some()).then_some(name)
    };
    let has_full_names = tensors.iter().any(|tensor| tensor.name.starts_with(BASE_MODEL_PREFIX));
    if has_full_names || !tensors.iter().any(|tensor| full_name(tensor).is_some()) {
        return;
    }
    for tensor in tensors.iter_mut() {
        if let Some(name) = full_name(tensor) {
            tensor.name = name;
        }
    }
    config.stored.base_model = true;
    config.stored.lm_head = config.tie_word_embeddings || tensors.iter().any(|tensor| tensor.name == LM_HEAD);
}

/// The index of every tensor. Where the embeddings are tied and only `lm_head.weight` is stored, that is the embedding.
pub(crate) fn by_name(config: &ModelConfig, tensors: &[TensorInfo]) -> HashMap<String, usize> {
    let mut out: HashMap<_, _> = tensors.iter().enumerate().map(|(at, tensor)| (tensor.name.clone(), at)).collect();
    if config.tie_word_embeddings
        && let Some(&lm_head) = out.get(LM_HEAD)
    {
        out.entry(EMBED_TOKENS.to_owned()).or_insert(lm_head);
    }
    out
}
