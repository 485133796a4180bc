//! Mistral: `transformers/models/mistral/configuration_mistral.py` and `modeling_mistral.py`.

use super::{AttentionBias, Defaults, Family, Forward};

pub(super) static FAMILY: Family = Family {
    model_type: "mistral",
    class_prefix: "Mistral",
    defaults: Defaults {
        num_key_value_heads: Some(8),
        head_dim: None,
        hidden_act: "silu",
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        tie_word_embeddings: false,
        max_position_embeddings: 131_072,
        sliding_window: Some(4096),
        sliding_window_needs_flag: false,
    },
    forward: Forward {
        norm_weight_plus_one: false,
        scale_embeddings: false,
        qk_norm: false,
        attention_bias: AttentionBias::Never,
        mlp_bias: false,
    },
};
