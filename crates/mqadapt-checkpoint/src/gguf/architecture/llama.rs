//! Llama, and what shares `LlamaForCausalLM` with it: Mistral, `SmolLM` and others.

use serde_json::{Map, Value, json};

use super::modules::{NORMS_BEFORE, PROJECTIONS};
use super::{Architecture, RMS_NORM_EPS};
use crate::gguf::described::{Model, object};
use crate::gguf::problem::Parsed;
use crate::gguf::rope;

pub(super) static LLAMA: Architecture = Architecture {
    name: "llama",
    model_type: "llama",
    class: "LlamaForCausalLM",
    modules: &[PROJECTIONS, NORMS_BEFORE],
    permuted: true,
    norm_plus_one: false,
    partly_rotated: false,
    norm_eps: RMS_NORM_EPS,
    fields,
};

fn fields(model: &Model) -> Parsed<Map<String, Value>> {
    let mut out = object(json!({
        "attention_bias": model.has_bias(&["attn_q", "attn_k", "attn_v", "attn_output"]),
        "hidden_act": "silu",
        "mlp_bias": model.has_bias(&["ffn_gate", "ffn_up", "ffn_down"]),
    }));
    out.extend(rope::alike(model)?);
    Ok(out)
}
