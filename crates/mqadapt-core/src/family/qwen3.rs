//! Qwen3: `transformers/models/qwen3/configuration_qwen3.py` and `modeling_qwen3.py`.

use super::{Defaults, Family, Forward, QkNorm, Windows};

pub(super) static FAMILY: Family = Family {
    model_type: "qwen3",
    class_prefix: "Qwen3",
    base_model: "Qwen3Model",
    defaults: Defaults {
        num_key_value_heads: Some(32),
        head_dim: Some(128),
        max_position_embeddings: 32_768,
        sliding_window: Some(4096),
        ..Defaults::LLAMA
    },
    forward: Forward { qk_norm: QkNorm::Head, windows: Windows::Flagged, ..Forward::LLAMA },
    ..Family::LLAMA
};
