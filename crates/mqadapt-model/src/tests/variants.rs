//! The tiny models of [`super::fixtures`] in every shape, and loaded in different ways.

use serde_json::{Value, json};

use super::fixtures::{Tiny, config};
use crate::{Device, LoadOptions, Model};

impl Tiny {
    pub(super) fn on(&self, device: Device) -> Model {
        self.load(&LoadOptions { device, ..LoadOptions::default() })
    }

    /// Small passes, so that everything is cut.
    pub(super) fn in_flight(&self, max_tokens_in_flight: usize) -> Model {
        self.load(&LoadOptions { max_tokens_in_flight, ..LoadOptions::default() })
    }
}

/// Every family and the shapes that its models come in.
pub(super) fn shapes() -> Vec<Value> {
    let mixed =
        json!({ "per_layer_config": { "00": { "num_key_value_heads": 1 }, "2": { "num_key_value_heads": 2 } } });
    let mut shapes = vec![
        config("llama", &json!({})),
        config("llama", &json!({ "num_key_value_heads": 2, "tie_word_embeddings": true })),
        config("llama", &json!({ "num_key_value_heads": 1, "attention_bias": true, "mlp_bias": true })),
        config("llama", &mixed),
        config("llama", &json!({ "hidden_act": "gelu" })),
        config("gemma", &json!({ "num_key_value_heads": 1 })),
        config("gemma", &mixed),
        config("mistral", &json!({ "num_key_value_heads": 2, "sliding_window": 7 })),
        config(
            "qwen2",
            &json!({ "num_key_value_heads": 3, "use_sliding_window": true, "sliding_window": 9,
                                 "max_window_layers": 1 }),
        ),
        config("qwen3", &json!({ "num_key_value_heads": 2, "tie_word_embeddings": true })),
        config("qwen3", &mixed),
    ];
    let scaling = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 64 });
    shapes.push(config("llama", &json!({ "rope_scaling": scaling })));
    let yarn = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64 });
    shapes.push(config("llama", &json!({ "rope_scaling": yarn, "num_key_value_heads": 2 })));
    let kinds = ["sliding_attention", "full_attention", "sliding_attention"];
    shapes.extend([
        config(
            "gemma2",
            &json!({ "num_key_value_heads": 2, "sliding_window": 7, "attn_logit_softcapping": 3.0,
                     "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 20 }),
        ),
        config(
            "gemma3_text",
            &json!({ "sliding_window": 7, "layer_types": kinds, "rope_local_base_freq": 50.0, "num_key_value_heads": 2 }),
        ),
        config(
            "granite",
            &json!({ "embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5,
                     "logits_scaling": 3.0, "attention_bias": true, "mlp_bias": true }),
        ),
        config("olmo2", &json!({ "num_key_value_heads": 3 })),
        config("olmo2", &mixed),
        config("olmo3", &json!({ "sliding_window": 7, "layer_types": kinds })),
        config("phi3", &json!({ "num_key_value_heads": 2, "partial_rotary_factor": 0.5 })),
        config("phi3", &mixed),
        config("smollm3", &json!({ "no_rope_layers": [1, 0, 1], "num_key_value_heads": 2 })),
    ]);
    let gpt = |model_type: &str, over: &Value| {
        let mut config = config(model_type, over);
        for field in ["head_dim", "num_key_value_heads"].iter().filter(|field| over.get(field).is_none()) {
            config.as_object_mut().unwrap().remove(*field);
        }
        config
    };
    let ours = |class: &str, over: Value| {
        let mut over = over;
        over["architectures"] = json!([format!("LayerwiseKV{class}ForCausalLM")]);
        over
    };
    let differ = json!({ "0": { "num_key_value_heads": 1 }, "2": { "num_key_value_heads": 2 } });
    shapes.extend([
        gpt("gpt2", &json!({})),
        gpt(
            "gpt2",
            &json!({ "tie_word_embeddings": false, "scale_attn_weights": false, "activation_function": "gelu" }),
        ),
        gpt("gpt_bigcode", &json!({})),
        gpt("gpt_bigcode", &ours("GPTBigCode", json!({ "num_key_value_heads": 6, "per_layer_config": differ }))),
        gpt("gpt_neox", &json!({})),
        gpt("gpt_neox", &json!({ "rotary_pct": 1.0, "use_parallel_residual": false, "hidden_act": "gelu_new" })),
        gpt("gpt_neox", &ours("GPTNeoX", json!({ "num_key_value_heads": 6, "per_layer_config": differ }))),
    ]);
    shapes
}
