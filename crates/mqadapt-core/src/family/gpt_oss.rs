//! gpt-oss, a mixture of experts: `transformers/models/gpt_oss/configuration_gpt_oss.py` and `modeling_gpt_oss.py`.

use super::{AttentionBias, Defaults, Family, Forward};

pub(super) static FAMILY: Family = Family {
    model_type: "gpt_oss",
    class_prefix: "GptOss",
    base_model: "GptOssModel",
    defaults: Defaults {
        num_attention_heads: Some(64),
        num_key_value_heads: Some(8),
        head_dim: Some(64),
        ..Defaults::LLAMA
    },
    forward: Forward { attention_bias: AttentionBias::UnlessField, ..Forward::LLAMA },
    attention_kept_by: &["mxfp4"],
    runnable: false,
    ..Family::LLAMA
};
