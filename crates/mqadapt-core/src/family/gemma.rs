//! Gemma: `transformers/models/gemma/configuration_gemma.py` and `modeling_gemma.py`.

use super::{AttentionBias, Defaults, Family, Forward};

pub(super) static FAMILY: Family = Family {
    model_type: "gemma",
    class_prefix: "Gemma",
    defaults: Defaults {
        num_key_value_heads: Some(16),
        head_dim: Some(256),
        hidden_act: "gelu_pytorch_tanh",
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        tie_word_embeddings: true,
        max_position_embeddings: 8192,
        sliding_window: None,
        sliding_window_needs_flag: false,
    },
    forward: Forward {
        norm_weight_plus_one: true,
        scale_embeddings: true,
        qk_norm: false,
        attention_bias: AttentionBias::ByField,
        mlp_bias: false,
    },
};
