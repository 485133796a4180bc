//! Phi-3: `transformers/models/phi3/configuration_phi3.py` and `modeling_phi3.py`.

use super::{AttentionBias, Defaults, Family, Forward, Fused, Module, Rotary, Windows};

pub(super) static FAMILY: Family = Family {
    model_type: "phi3",
    class_prefix: "Phi3",
    base_model: "Phi3Model",
    defaults: Defaults {
        rms_norm_eps: 1e-5,
        max_position_embeddings: 4096,
        original_max_position_embeddings: Some(4096.0),
        ..Defaults::LLAMA
    },
    fused: &[
        Fused {
            name: "self_attn.qkv_proj",
            modules: &[Module::QProj, Module::KProj, Module::VProj],
            interleaved: false,
        },
        Fused { name: "mlp.gate_up_proj", modules: &[Module::GateProj, Module::UpProj], interleaved: false },
    ],
    forward: Forward {
        attention_bias: AttentionBias::Never,
        windows: Windows::Every,
        rotary: Rotary::Partial,
        ..Forward::LLAMA
    },
    ..Family::LLAMA
};
