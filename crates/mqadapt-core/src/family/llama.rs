//! Llama: `transformers/models/llama/configuration_llama.py` and `modeling_llama.py`.

use super::{AttentionBias, Defaults, Family, Forward};

pub(super) static FAMILY: Family = Family {
    model_type: "llama",
    class_prefix: "Llama",
    defaults: Defaults {
        num_key_value_heads: None,
        head_dim: None,
        hidden_act: "silu",
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        tie_word_embeddings: false,
        max_position_embeddings: 2048,
        sliding_window: None,
        sliding_window_needs_flag: false,
    },
    forward: Forward {
        norm_weight_plus_one: false,
        scale_embeddings: false,
        qk_norm: false,
        attention_bias: AttentionBias::ByField,
        mlp_bias: true,
    },
};
