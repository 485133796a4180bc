//! Qwen3 MoE, a mixture of experts: `transformers/models/qwen3_moe/configuration_qwen3_moe.py` and `modeling_qwen3_moe.py`.

use super::{Defaults, Family, Forward, QkNorm};

pub(super) static FAMILY: Family = Family {
    model_type: "qwen3_moe",
    class_prefix: "Qwen3Moe",
    base_model: "Qwen3MoeModel",
    defaults: Defaults { num_key_value_heads: Some(4), ..Defaults::LLAMA },
    forward: Forward { qk_norm: QkNorm::Head, ..Forward::LLAMA },
    runnable: false,
    ..Family::LLAMA
};
