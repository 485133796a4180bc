//! Mistral 3, text and images: `transformers/models/mistral3/configuration_mistral3.py` and `modeling_mistral3.py`.

use super::{AttentionBias, Defaults, Family, Forward};

pub(super) static FAMILY: Family = Family {
    model_type: "mistral3",
    class_prefix: "Mistral3",
    base_model: "Mistral3Model",
    defaults: Defaults { num_attention_heads: Some(32), num_key_value_heads: Some(8), ..Defaults::LLAMA },
    forward: Forward { attention_bias: AttentionBias::Never, ..Forward::LLAMA },
    text_config: true,
    prefixes: &["model.language_model.", "language_model.model."],
    runnable: false,
    ..Family::LLAMA
};
