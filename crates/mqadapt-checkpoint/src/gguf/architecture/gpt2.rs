//! GPT-2. A file stores its matrices as other families do; those of a Hugging Face folder are their transposes.

use serde_json::{Map, Value, json};

use super::Architecture;
use super::modules::{FUSED_ATTENTION, NORMS_BEFORE, PLAIN_MLP};
use crate::gguf::described::{Model, object};
use crate::gguf::problem::Parsed;

pub(super) static GPT2: Architecture = Architecture {
    name: "gpt2",
    model_type: "gpt2",
    class: "GPT2LMHeadModel",
    modules: &[FUSED_ATTENTION, PLAIN_MLP, NORMS_BEFORE],
    permuted: false,
    norm_plus_one: false,
    partly_rotated: false,
    norm_eps: "attention.layer_norm_epsilon",
    fields,
};

fn fields(model: &Model) -> Parsed<Map<String, Value>> {
    let heads = model.sizes.num_attention_heads;
    if model.sizes.num_key_value_heads.iter().any(|own| *own != heads) {
        let detail = format!("must be the {heads} query heads, as a GPT-2 has them");
        return Err(model.keys.problem("attention.head_count_kv", detail));
    }
    let (hidden, inner) = (model.sizes.hidden_size, model.sizes.intermediate_size);
    Ok(object(json!({
        "activation_function": "gelu_new",
        // four times the width is what `null` says
        "intermediate_size": (hidden.checked_mul(4) != Some(inner)).then_some(inner),
        "scale_attn_weights": true,
        // its configuration has other names for these, or none
        "attention_dropout": null,
        "head_dim": null,
        "num_key_value_heads": null,
    })))
}
