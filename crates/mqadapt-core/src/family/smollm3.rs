//! SmolLM3: `transformers/models/smollm3/configuration_smollm3.py` and `modeling_smollm3.py`.

use super::{Defaults, Family, Forward, Rotary, Windows};

pub(super) static FAMILY: Family = Family {
    model_type: "smollm3",
    class_prefix: "SmolLM3",
    base_model: "SmolLM3Model",
    defaults: Defaults {
        num_key_value_heads: Some(4),
        rope_theta: 2_000_000.0,
        tie_word_embeddings: true,
        max_position_embeddings: 32_768,
        ..Defaults::LLAMA
    },
    forward: Forward { mlp_bias: true, windows: Windows::WithoutRope, rotary: Rotary::SomeLayers, ..Forward::LLAMA },
    ..Family::LLAMA
};
