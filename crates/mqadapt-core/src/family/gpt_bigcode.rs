//! GPT-BigCode (StarCoder): `transformers/models/gpt_bigcode/configuration_gpt_bigcode.py` and `modeling_gpt_bigcode.py`. A GPT-2
//! with one K/V head, and matrices stored as those of other families; our modelling file gives it any number of them.

use super::{
    AttentionBias, AttentionScale, Defaults, Family, Forward, Fused, MlpKind, Module, Names, NormKind, Rotary,
};

pub(super) static FAMILY: Family = Family {
    model_type: "gpt_bigcode",
    class_prefix: "GPTBigCode",
    base_model: "GPTBigCodeModel",
    defaults: Defaults { num_key_value_heads: Some(1), hidden_act: "gelu_pytorch_tanh", ..GPT2.defaults },
    requires: &[("multi_query", true), ("add_cross_attention", false)],
    stock_key_value_heads: Some(1),
    ..GPT2
};

/// What it has of GPT-2.
pub(super) const GPT2: Family = Family {
    defaults: Defaults {
        intermediate_factor: Some(4),
        hidden_act: "gelu_new",
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        max_position_embeddings: 1024,
        ..Defaults::LLAMA
    },
    field_names: &[
        ("hidden_size", "n_embd"),
        ("num_attention_heads", "n_head"),
        ("num_hidden_layers", "n_layer"),
        ("max_position_embeddings", "n_positions"),
        ("intermediate_size", "n_inner"),
        ("rms_norm_eps", "layer_norm_epsilon"),
    ],
    names: Names {
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
    },
    fused: &[Fused {
        name: "attn.c_attn",
        modules: &[Module::QProj, Module::KProj, Module::VProj],
        interleaved: false,
    }],
    forward: Forward {
        norm: NormKind::Layer,
        attention_scale: AttentionScale::Flagged,
        attention_bias: AttentionBias::Always,
        mlp: MlpKind::Plain,
        rotary: Rotary::Learned,
        activation_field: "activation_function",
        ..Forward::LLAMA
    },
    ..Family::LLAMA
};
