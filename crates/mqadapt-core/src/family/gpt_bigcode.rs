//! GPT-BigCode (StarCoder): `transformers/models/gpt_bigcode/configuration_gpt_bigcode.py` and `modeling_gpt_bigcode.py`. A GPT-2
//! with one K/V head, and matrices stored as those of other families; our modelling file gives it any number of them.

use super::{Defaults, Family, gpt2};

pub(super) static FAMILY: Family = Family {
    model_type: "gpt_bigcode",
    class_prefix: "GPTBigCode",
    base_model: "GPTBigCodeModel",
    defaults: Defaults { num_key_value_heads: Some(1), hidden_act: "gelu_pytorch_tanh", ..gpt2::DEFAULTS },
    field_names: gpt2::FIELD_NAMES,
    requires: &[("multi_query", true), ("add_cross_attention", false)],
    names: gpt2::NAMES,
    fused: &[gpt2::FUSED],
    stock_key_value_heads: Some(1),
    forward: gpt2::FORWARD,
    ..Family::LLAMA
};
