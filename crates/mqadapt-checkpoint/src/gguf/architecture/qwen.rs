//! Qwen 2 (and 2.5) and Qwen 3. llama.cpp computes neither with a window.

use serde_json::{Map, Value, json};

use super::modules::{NORMS_BEFORE, PROJECTIONS, QUERY_KEY_NORMS};
use super::{Architecture, RMS_NORM_EPS};
use crate::gguf::described::{Model, object};
use crate::gguf::problem::Parsed;
use crate::gguf::rope;

pub(super) static QWEN2: Architecture = Architecture {
    name: "qwen2",
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    modules: &[PROJECTIONS, NORMS_BEFORE],
    permuted: false,
    norm_plus_one: false,
    partly_rotated: false,
    norm_eps: RMS_NORM_EPS,
    fields: shared_fields,
};

pub(super) static QWEN3: Architecture = Architecture {
    name: "qwen3",
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    modules: &[PROJECTIONS, NORMS_BEFORE, QUERY_KEY_NORMS],
    fields: qwen3_fields,
    ..QWEN2
};

fn shared_fields(model: &Model) -> Parsed<Map<String, Value>> {
    let mut out = object(json!({
        "hidden_act": "silu",
        "max_window_layers": model.sizes.num_hidden_layers,
        "sliding_window": null,
        "use_sliding_window": false,
    }));
    out.extend(rope::alike(model)?);
    Ok(out)
}

fn qwen3_fields(model: &Model) -> Parsed<Map<String, Value>> {
    let mut out = shared_fields(model)?;
    let biased = model.has_bias(&["attn_q", "attn_k", "attn_v", "attn_output"]);
    out.insert("attention_bias".to_owned(), json!(biased));
    Ok(out)
}
