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
    shapes
}
