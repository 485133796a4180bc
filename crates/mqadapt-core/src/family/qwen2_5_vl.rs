//! Qwen2.5-VL, text and images: `transformers/models/qwen2_5_vl/configuration_qwen2_5_vl.py` and `modeling_qwen2_5_vl.py`.

use super::{AttentionBias, Defaults, Family, Forward};

pub(super) static FAMILY: Family = Family {
    model_type: "qwen2_5_vl",
    class_prefix: "Qwen2_5_VL",
    base_model: "Qwen2_5_VLModel",
    defaults: Defaults { num_key_value_heads: Some(8), ..Defaults::LLAMA },
    forward: Forward { attention_bias: AttentionBias::Qkv, ..Forward::LLAMA },
    text_config: true,
    prefixes: &["model.language_model.", "language_model.model."],
    runnable: false,
    ..Family::LLAMA
};
