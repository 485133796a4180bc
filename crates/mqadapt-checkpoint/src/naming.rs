//! Names of tensors: in, those of a checkpoint's files; out, those that a Llama's `...ForCausalLM` has, which all other code
//! uses. A tensor that holds several modules becomes one tensor for each of them.

use std::collections::HashMap;

use mqadapt_core::family::{EMBED_TOKENS, LM_HEAD, LayerTensor, Module, NORM, PREFIX};
use mqadapt_core::{Family, ModelConfig};

use crate::TensorInfo;

/// Gives tensors whose names have another prefix than `model.` (those of a base model, as `LlamaModel.save_pretrained` writes them,
/// or of the language model of a larger one) their full names, and notes in `config` what the checkpoint stores.
pub(crate) fn adopt(config: &mut ModelConfig, tensors: &mut [TensorInfo]) {
    let family = config.family;
    let full_name = |prefix: &str, tensor: &TensorInfo| {
        let name = format!("{PREFIX}{}", tensor.name.strip_prefix(prefix)?);
        let known =
            name == EMBED_TOKENS || name == NORM || LayerTensor::parse(&name).is_some() || is_fused(family, &name);
        known.then_some(name)
    };
    let candidates = [PREFIX].into_iter().chain(family.prefixes.iter().copied()).chain([""]);
    let mut found = candidates.filter(|prefix| tensors.iter().any(|tensor| full_name(prefix, tensor).is_some()));
    let Some(prefix) = found.next().filter(|prefix| *prefix != PREFIX) else { return };
    for tensor in tensors.iter_mut() {
        if let Some(name) = full_name(prefix, tensor) {
            tensor.name = name;
        }
    }
    config.stored.prefix = prefix;
    if prefix.is_empty() {
        config.stored.lm_head = config.tie_word_embeddings || tensors.iter().any(|tensor| tensor.name == LM_HEAD);
    }
}

/// Whether a full name is that of a tensor that holds several modules.
fn is_fused(family: &Family, name: &str) -> bool {
    let module = || {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        layer.parse::<usize>().ok()?;
        rest.rsplit_once('.').map(|(module, _)| module)
    };
    !family.fused.is_empty() && module().is_some_and(|module| family.fused.iter().any(|fused| fused.name == module))
}

/// Puts in the place of every tensor that holds several modules one tensor for each of them: a range of its rows. One whose
/// shape is not that of its modules stays as it is, and is missed by what checks the shapes.
pub(crate) fn split(config: &ModelConfig, tensors: &mut Vec<TensorInfo>) {
    if config.family.fused.is_empty() {
        return;
    }
    let mut fused = HashMap::new();
    for layer_idx in 0..config.num_hidden_layers {
        for of in config.family.fused {
            fused.extend([false, true].map(|bias| (of.tensor_name(layer_idx, bias), (layer_idx, of, bias))));
        }
    }
    let split = |tensor: TensorInfo| match fused.get(&tensor.name) {
        Some(&(layer_idx, of, bias)) => {
            parts(config, layer_idx, of.modules, bias, &tensor).unwrap_or_else(|| vec![tensor])
        }
        None => vec![tensor],
    };
    *tensors = std::mem::take(tensors).into_iter().flat_map(split).collect();
}

/// The rows of each module, one under the other; `None` where they are not the tensor's rows.
pub(crate) fn parts(
    config: &ModelConfig,
    layer_idx: usize,
    modules: &[Module],
    bias: bool,
    tensor: &TensorInfo,
) -> Option<Vec<TensorInfo>> {
    let rows: Option<Vec<usize>> =
        modules.iter().map(|&module| config.weight_shape(layer_idx, module)?.first().copied()).collect();
    let (rows, all) = (rows?, *tensor.shape.first()?);
    if rows.iter().sum::<usize>() != all || !tensor.bytes.is_multiple_of(all as u64) {
        return None;
    }
    let row_bytes = tensor.bytes / all as u64;
    let mut offset = tensor.offset;
    let part = |(&module, rows): (&Module, usize)| {
        let mut part = TensorInfo { name: LayerTensor { layer_idx, module, bias }.name(), ..tensor.clone() };
        part.shape[0] = rows;
        (part.bytes, part.offset) = (rows as u64 * row_bytes, offset);
        offset += part.bytes;
        part
    };
    Some(modules.iter().zip(rows).map(part).collect())
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
