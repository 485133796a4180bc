//! Qwen3: `transformers/models/qwen3/configuration_qwen3.py` and `modeling_qwen3.py`.

use super::{AttentionBias, Defaults, Family, Forward};

pub(super) static FAMILY: Family = Family {
    model_type: "qwen3",
    class_prefix: "Qwen3",
    defaults: Defaults {
        num_key_value_heads: Some(32),
        head_dim: Some(128),
        hidden_act: "silu",
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        tie_word_embeddings: false,
        max_position_embeddings: 32_768,
        sliding_window: Some(4096),
        sliding_window_needs_flag: true,
    },
    forward: Forward {
        norm_weight_plus_one: false,
        scale_embeddings: false,
        qk_norm: true,
        attention_bias: AttentionBias::ByField,
        mlp_bias: false,
    },
};
