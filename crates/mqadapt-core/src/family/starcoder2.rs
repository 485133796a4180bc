//! `StarCoder2`: `transformers/models/starcoder2/configuration_starcoder2.py` and `modeling_starcoder2.py`.

use super::{AttentionBias, Defaults, Family, Forward, MlpKind, Module, Names, NormKind, Windows};

pub(super) static FAMILY: Family = Family {
    model_type: "starcoder2",
    class_prefix: "Starcoder2",
    base_model: "Starcoder2Model",
    defaults: Defaults {
        num_attention_heads: Some(24),
        num_key_value_heads: Some(2),
        hidden_act: "gelu_pytorch_tanh",
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        max_position_embeddings: 4096,
        ..Defaults::LLAMA
    },
    field_names: &[("rms_norm_eps", "norm_epsilon")],
    requires: &[("use_bias", true)],
    names: Names { modules: &[(Module::UpProj, "mlp.c_fc"), (Module::DownProj, "mlp.c_proj")], ..Names::LLAMA },
    forward: Forward {
        norm: NormKind::Layer,
        attention_bias: AttentionBias::Always,
        mlp: MlpKind::Plain,
        windows: Windows::Every,
        ..Forward::LLAMA
    },
    ..Family::LLAMA
};
