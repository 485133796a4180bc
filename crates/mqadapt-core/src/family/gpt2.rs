//! GPT-2: `transformers/models/gpt2/configuration_gpt2.py` and `modeling_gpt2.py`. Its class has as many K/V heads as query
//! heads; merged ones are written as a GPT-BigCode, which computes the same with one K/V head.

use super::{Family, gpt_bigcode};

pub(super) static FAMILY: Family = Family {
    model_type: "gpt2",
    class_prefix: "GPT2",
    base_model: "GPT2Model",
    requires: &[
        ("scale_attn_by_inverse_layer_idx", false),
        ("reorder_and_upcast_attn", false),
        ("add_cross_attention", false),
    ],
    transposed: true,
    merged: Some(&gpt_bigcode::FAMILY),
    ..gpt_bigcode::GPT2
};
