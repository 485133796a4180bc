//! Qwen2: `transformers/models/qwen2/configuration_qwen2.py` and `modeling_qwen2.py`.

use super::{AttentionBias, Defaults, Family, Forward, Windows};

pub(super) static FAMILY: Family = Family {
    model_type: "qwen2",
    class_prefix: "Qwen2",
    base_model: "Qwen2Model",
    defaults: Defaults {
        num_key_value_heads: Some(32),
        max_position_embeddings: 32_768,
        sliding_window: Some(4096),
        ..Defaults::LLAMA
    },
    forward: Forward { attention_bias: AttentionBias::Qkv, windows: Windows::Flagged, ..Forward::LLAMA },
    ..Family::LLAMA
};
