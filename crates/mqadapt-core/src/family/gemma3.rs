//! Gemma 3, text and images: `transformers/models/gemma3/configuration_gemma3.py` and `modeling_gemma3.py`.

use super::{Defaults, Family, Forward, QkNorm};

pub(super) static FAMILY: Family = Family {
    model_type: "gemma3",
    class_prefix: "Gemma3",
    base_model: "Gemma3Model",
    defaults: Defaults {
        num_attention_heads: Some(8),
        num_key_value_heads: Some(4),
        head_dim: Some(256),
        ..Defaults::LLAMA
    },
    forward: Forward { qk_norm: QkNorm::Head, ..Forward::LLAMA },
    text_config: true,
    prefixes: &["model.language_model.", "language_model.model."],
    runnable: false,
    ..Family::LLAMA
};
