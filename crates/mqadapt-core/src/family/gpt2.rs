//! GPT-2: `transformers/models/gpt2/configuration_gpt2.py` and `modeling_gpt2.py`. Its class has as many K/V heads as query
//! heads; merged ones are written as a GPT-BigCode, which computes the same with one K/V head.

use super::{
    AttentionBias, AttentionScale, Defaults, Family, Forward, Fused, MlpKind, Module, Names, NormKind, Rotary,
    gpt_bigcode,
};

pub(super) const NAMES: Names = Names {
    prefix: "transformer.",
    layers: "h",
    embed_tokens: "wte",
    embed_positions: Some("wpe"),
    norm: "ln_f",
    modules: &[
        (Module::InputLayernorm, "ln_1"),
        (Module::OProj, "attn.c_proj"),
        (Module::PostAttentionLayernorm, "ln_2"),
        (Module::UpProj, "mlp.c_fc"),
        (Module::DownProj, "mlp.c_proj"),
    ],
    ..Names::LLAMA
};

pub(super) const DEFAULTS: Defaults = Defaults {
    intermediate_factor: Some(4),
    hidden_act: "gelu_new",
    rms_norm_eps: 1e-5,
    tie_word_embeddings: true,
    max_position_embeddings: 1024,
    ..Defaults::LLAMA
};

pub(super) const FORWARD: Forward = Forward {
    norm: NormKind::Layer,
    attention_scale: AttentionScale::Flagged,
    attention_bias: AttentionBias::Always,
    mlp: MlpKind::Plain,
    rotary: Rotary::Learned,
    activation_field: "activation_function",
    ..Forward::LLAMA
};

pub(super) const FIELD_NAMES: &[(&str, &str)] = &[
    ("hidden_size", "n_embd"),
    ("num_attention_heads", "n_head"),
    ("num_hidden_layers", "n_layer"),
    ("max_position_embeddings", "n_positions"),
    ("intermediate_size", "n_inner"),
    ("rms_norm_eps", "layer_norm_epsilon"),
];

pub(super) const FUSED: Fused =
    Fused { name: "attn.c_attn", modules: &[Module::QProj, Module::KProj, Module::VProj], interleaved: false };

pub(super) static FAMILY: Family = Family {
    model_type: "gpt2",
    class_prefix: "GPT2",
    base_model: "GPT2Model",
    defaults: DEFAULTS,
    field_names: FIELD_NAMES,
    requires: &[
        ("scale_attn_by_inverse_layer_idx", false),
        ("reorder_and_upcast_attn", false),
        ("add_cross_attention", false),
    ],
    names: NAMES,
    fused: &[FUSED],
    transposed: true,
    merged: Some(&gpt_bigcode::FAMILY),
    forward: FORWARD,
    ..Family::LLAMA
};
