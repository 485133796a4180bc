//! Mistral: `transformers/models/mistral/configuration_mistral.py` and `modeling_mistral.py`.

use super::{AttentionBias, Defaults, Family, Forward, Windows};

pub(super) static FAMILY: Family = Family {
    model_type: "mistral",
    class_prefix: "Mistral",
    base_model: "MistralModel",
    defaults: Defaults {
        num_key_value_heads: Some(8),
        max_position_embeddings: 131_072,
        sliding_window: Some(4096),
        ..Defaults::LLAMA
    },
    forward: Forward { attention_bias: AttentionBias::Never, windows: Windows::Every, ..Forward::LLAMA },
    ..Family::LLAMA
};
