//! Granite: `transformers/models/granite/configuration_granite.py` and `modeling_granite.py`.

use super::{AttentionScale, Defaults, EmbeddingScale, Family, Forward};

pub(super) static FAMILY: Family = Family {
    model_type: "granite",
    class_prefix: "Granite",
    base_model: "GraniteModel",
    defaults: Defaults::LLAMA,
    forward: Forward {
        embedding_scale: EmbeddingScale::Multiplier,
        attention_scale: AttentionScale::Multiplier,
        multipliers: true,
        mlp_bias: true,
        ..Forward::LLAMA
    },
    ..Family::LLAMA
};
