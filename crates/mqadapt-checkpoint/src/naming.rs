//! Names of tensors: in, those of a checkpoint's files; out, those that a Llama's `...ForCausalLM` has, which all other code
//! uses. A tensor that holds several modules becomes one tensor for each of them.

use std::collections::HashMap;

use mqadapt_core::ModelConfig;
use mqadapt_core::family::{EMBED_TOKENS, Fused, LM_HEAD, LayerTensor, Module};

use crate::{TensorInfo, View};

/// Gives tensors whose names have another prefix than `model.` (those of a base model, as `LlamaModel.save_pretrained` writes them,
/// or of the language model of a larger one) their full names, and notes in `config` what the checkpoint stores.
pub(crate) fn adopt(config: &mut ModelConfig, tensors: &mut [TensorInfo]) {
    let family = config.family;
    let role = |prefix: &str, tensor: &TensorInfo| family.role(tensor.name.strip_prefix(prefix)?);
    let candidates = [family.names.prefix].into_iter().chain(family.prefixes.iter().copied()).chain([""]);
    let mut found = candidates.filter(|prefix| tensors.iter().any(|tensor| role(prefix, tensor).is_some()));
    let Some(prefix) = found.next() else { return };
    let lm_head = family.lm_head_name();
    for tensor in tensors.iter_mut() {
        if tensor.name == lm_head {
            LM_HEAD.clone_into(&mut tensor.name);
        } else if let Some(name) = role(prefix, tensor) {
            tensor.name = name;
        }
    }
    config.stored.prefix = prefix;
    if prefix.is_empty() {
        config.stored.lm_head = config.tie_word_embeddings || tensors.iter().any(|tensor| tensor.name == LM_HEAD);
    }
}

/// Puts in the place of every tensor that holds several modules one tensor for each of them: a range of its rows, or a view. One
/// whose shape is not that of its modules stays as it is, and is missed by what checks the shapes.
pub(crate) fn split(config: &ModelConfig, tensors: &mut Vec<TensorInfo>) {
    let family = config.family;
    if family.fused.is_empty() && !family.transposed {
        return;
    }
    let mut fused = HashMap::new();
    for layer_idx in 0..config.num_hidden_layers {
        for of in family.fused {
            fused.extend([false, true].map(|bias| (of.tensor_name(layer_idx, bias), (layer_idx, of, bias))));
        }
    }
    let split = |tensor: TensorInfo| {
        let parts = match (fused.get(&tensor.name), LayerTensor::parse(&tensor.name)) {
            (Some(&(layer_idx, of, bias)), _) if of.interleaved || (family.transposed && !bias) => {
                views(config, layer_idx, of, bias, &tensor)
            }
            (Some(&(layer_idx, of, bias)), _) => parts(config, layer_idx, of.modules, bias, &tensor),
            (None, Some(LayerTensor { layer_idx, module, bias: false })) if family.transposed && !module.is_norm() => {
                let alone = &[module];
                views_of(config, layer_idx, alone, &tensor)
            }
            _ => None,
        };
        parts.unwrap_or_else(|| vec![tensor])
    };
    *tensors = std::mem::take(tensors).into_iter().flat_map(split).collect();
}

/// The modules of a tensor in which they are not one under the other.
fn views(
    config: &ModelConfig,
    layer_idx: usize,
    of: &Fused,
    bias: bool,
    tensor: &TensorInfo,
) -> Option<Vec<TensorInfo>> {
    if !of.interleaved {
        return views_of(config, layer_idx, of.modules, tensor);
    }
    let (heads, rows) = (config.num_attention_heads, config.head_dim);
    let columns = if bias { 1 } else { config.hidden_size };
    let count = of.modules.len();
    let out_features = |module: &Module| config.weight_shape(layer_idx, *module)?.first().copied();
    let stored = if bias { vec![count * heads * rows] } else { vec![count * heads * rows, columns] };
    if tensor.shape != stored || !of.modules.iter().all(|module| out_features(module) == Some(heads * rows)) {
        return None;
    }
    let part = |(nth, &module): (usize, &Module)| {
        let view = View {
            stored_shape: stored.clone(),
            start: tensor.offset,
            first: nth * rows * columns,
            dims: [heads, rows, columns],
            strides: [count * rows * columns, columns, 1],
        };
        let shape = if bias { vec![heads * rows] } else { vec![heads * rows, columns] };
        share(tensor, LayerTensor { layer_idx, module, bias }, shape, view, nth * heads * rows * columns)
    };
    of.modules.iter().enumerate().map(part).collect()
}

/// The modules of a matrix that is stored `[in_features, out_features]`, one beside the other.
fn views_of(
    config: &ModelConfig,
    layer_idx: usize,
    modules: &[Module],
    tensor: &TensorInfo,
) -> Option<Vec<TensorInfo>> {
    let shapes: Option<Vec<Vec<usize>>> =
        modules.iter().map(|&module| config.weight_shape(layer_idx, module)).collect();
    let shapes = shapes?;
    let &[columns, all] = tensor.shape.as_slice() else { return None };
    let rows = |shape: &Vec<usize>| shape.first().copied().unwrap_or_default();
    if shapes.iter().any(|shape| shape.get(1) != Some(&columns)) || shapes.iter().map(rows).sum::<usize>() != all {
        return None;
    }
    let mut first = 0;
    let part = |(&module, shape): (&Module, Vec<usize>)| {
        let own = rows(&shape);
        let view = View {
            stored_shape: tensor.shape.clone(),
            start: tensor.offset,
            first,
            dims: [1, own, columns],
            strides: [0, 1, all],
        };
        let before = first * columns;
        first += own;
        share(tensor, LayerTensor::weight(layer_idx, module), shape, view, before)
    };
    modules.iter().zip(shapes).map(part).collect()
}

/// A tensor with a view of a stored one, and the share of its bytes behind those of so many values.
fn share(whole: &TensorInfo, role: LayerTensor, shape: Vec<usize>, view: View, before: usize) -> Option<TensorInfo> {
    let values = whole.len() as u64;
    if values == 0 || !whole.bytes.is_multiple_of(values) {
        return None;
    }
    let width = whole.bytes / values;
    let mut part = TensorInfo { name: role.name(), shape, view: Some(view), ..whole.clone() };
    part.bytes = part.len() as u64 * width;
    part.offset = whole.offset + before as u64 * width;
    Some(part)
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
