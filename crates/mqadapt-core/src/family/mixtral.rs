//! Mixtral, a mixture of experts: `transformers/models/mixtral/configuration_mixtral.py` and `modeling_mixtral.py`.

use super::{AttentionBias, Defaults, Family, Forward};

pub(super) static FAMILY: Family = Family {
    model_type: "mixtral",
    class_prefix: "Mixtral",
    base_model: "MixtralModel",
    defaults: Defaults { num_key_value_heads: Some(8), ..Defaults::LLAMA },
    forward: Forward { attention_bias: AttentionBias::Never, ..Forward::LLAMA },
    runnable: false,
    ..Family::LLAMA
};
