//! Gemma, Gemma 2 and the text models of Gemma 3.
//!
//! A file does not say by what the logits of attention are divided, nor, mostly, which layers have a window: llama.cpp knows
//! that by architecture and size (`llama-model.cpp`), and so does this.

use serde_json::{Map, Value, json};

use super::modules::{NORMS_AROUND, NORMS_BEFORE, PROJECTIONS, QUERY_KEY_NORMS};
use super::{Architecture, RMS_NORM_EPS};
use crate::gguf::described::{Model, object};
use crate::gguf::problem::Parsed;
use crate::gguf::rope;

pub(super) static GEMMA: Architecture = Architecture {
    name: "gemma",
    model_type: "gemma",
    class: "GemmaForCausalLM",
    modules: &[PROJECTIONS, NORMS_BEFORE],
    permuted: false,
    norm_plus_one: true,
    partly_rotated: false,
    norm_eps: RMS_NORM_EPS,
    fields: gemma_fields,
};

pub(super) static GEMMA2: Architecture = Architecture {
    name: "gemma2",
    model_type: "gemma2",
    class: "Gemma2ForCausalLM",
    modules: &[PROJECTIONS, NORMS_AROUND],
    fields: gemma2_fields,
    ..GEMMA
};

pub(super) static GEMMA3: Architecture = Architecture {
    name: "gemma3",
    model_type: "gemma3_text",
    class: "Gemma3ForCausalLM",
    modules: &[PROJECTIONS, NORMS_AROUND, QUERY_KEY_NORMS],
    fields: gemma3_fields,
    ..GEMMA
};

/// Layers of the largest models, which divide by the width of a head as if all heads together were as wide as the model.
const LAYERS_OF_GEMMA2_27B: usize = 46;
const LAYERS_OF_GEMMA3_27B: usize = 62;

fn gemma_fields(model: &Model) -> Parsed<Map<String, Value>> {
    let mut out = shared_fields();
    out.extend(rope::alike(model)?);
    Ok(out)
}

fn gemma2_fields(model: &Model) -> Parsed<Map<String, Value>> {
    let mut out = shared_fields();
    let softcapping = |name: &str, default: f64| model.keys.positive(name).map(|found| found.unwrap_or(default));
    out.extend(object(json!({
        "attn_logit_softcapping": softcapping("attn_logit_softcapping", 50.0)?,
        "final_logit_softcapping": softcapping("final_logit_softcapping", 30.0)?,
        "layer_types": layer_types(model, Some(2)),
        "query_pre_attn_scalar": query_pre_attn_scalar(model, LAYERS_OF_GEMMA2_27B),
        "sliding_window": model.keys.integer("attention.sliding_window")?.unwrap_or(4096),
    })));
    out.extend(rope::alike(model)?);
    Ok(out)
}

fn gemma3_fields(model: &Model) -> Parsed<Map<String, Value>> {
    let window = model.keys.integer("attention.sliding_window")?.filter(|&window| window > 0);
    let pattern = "attention.sliding_window_pattern";
    let full_every = model.keys.integer(pattern)?.unwrap_or(6);
    if full_every == 0 {
        return Err(model.keys.problem(pattern, "must not be 0"));
    }
    let mut out = shared_fields();
    out.extend(object(json!({
        "attn_logit_softcapping": null,
        "final_logit_softcapping": model.keys.positive("final_logit_softcapping")?,
        "layer_types": layer_types(model, window.map(|_| full_every)),
        "query_pre_attn_scalar": query_pre_attn_scalar(model, LAYERS_OF_GEMMA3_27B),
        "sliding_window": window,
    })));
    out.extend(rope::by_kind(model)?);
    Ok(out)
}

fn shared_fields() -> Map<String, Value> {
    object(json!({
        "attention_bias": false,
        // Gemma reads the first, the others the second
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
    }))
}

/// Every layer has a window but every `full_every`-th one; `None`: no layer has.
fn layer_types(model: &Model, full_every: Option<u64>) -> Vec<&'static str> {
    let slides = |layer: u64| full_every.is_some_and(|every| !(layer + 1).is_multiple_of(every));
    (0..model.sizes.num_hidden_layers as u64)
        .map(|layer| if slides(layer) { "sliding_attention" } else { "full_attention" })
        .collect()
}

fn query_pre_attn_scalar(model: &Model, layers_of_27b: usize) -> u64 {
    let sizes = &model.sizes;
    if sizes.num_hidden_layers == layers_of_27b {
        return sizes.hidden_size.checked_div(sizes.num_attention_heads).unwrap_or_default();
    }
    sizes.head_dim as u64
}
