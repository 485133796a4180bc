//! GPT-NeoX (Pythia): `transformers/models/gpt_neox/configuration_gpt_neox.py` and `modeling_gpt_neox.py`. Its class has as many
//! K/V heads as query heads, and no other class computes the same with fewer: merged ones need our modelling file.

use super::{AttentionBias, Defaults, Family, Forward, Fused, MlpKind, Module, Names, NormKind, Rotary};

const MODULES: &[Module] = &[Module::QProj, Module::KProj, Module::VProj];

pub(super) static FAMILY: Family = Family {
    fused: &[Fused { name: "attention.query_key_value", modules: MODULES, interleaved: true }],
    merged: Some(&MERGED),
    stock_key_value_heads: None,
    ..FIELDS
};

/// What we write where heads are merged: the rows of queries, keys and values one under the other.
static MERGED: Family = FIELDS;

const FIELDS: Family = Family {
    model_type: "gpt_neox",
    class_prefix: "GPTNeoX",
    base_model: "GPTNeoXModel",
    defaults: Defaults { num_attention_heads: Some(64), hidden_act: "gelu", rms_norm_eps: 1e-5, ..Defaults::LLAMA },
    field_names: &[
        ("rms_norm_eps", "layer_norm_eps"),
        ("rope_theta", "rotary_emb_base"),
        ("partial_rotary_factor", "rotary_pct"),
    ],
    names: Names {
        prefix: "gpt_neox.",
        embed_tokens: "embed_in",
        norm: "final_layer_norm",
        lm_head: "embed_out",
        modules: &[
            (Module::OProj, "attention.dense"),
            (Module::UpProj, "mlp.dense_h_to_4h"),
            (Module::DownProj, "mlp.dense_4h_to_h"),
        ],
        ..Names::LLAMA
    },
    fused: &[Fused { name: "attention.query_key_value", modules: MODULES, interleaved: false }],
    stock_key_value_heads: Some(0),
    forward: Forward {
        norm: NormKind::Layer,
        attention_bias: AttentionBias::UnlessField,
        mlp: MlpKind::Plain,
        parallel_residual: true,
        rotary: Rotary::Fraction(0.25),
        ..Forward::LLAMA
    },
    ..Family::LLAMA
};
