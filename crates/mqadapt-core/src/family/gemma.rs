//! Gemma: `transformers/models/gemma/configuration_gemma.py` and `modeling_gemma.py`.

use super::{Defaults, EmbeddingScale, Family, Forward};

pub(super) static FAMILY: Family = Family {
    model_type: "gemma",
    class_prefix: "Gemma",
    base_model: "GemmaModel",
    defaults: Defaults {
        num_key_value_heads: Some(16),
        head_dim: Some(256),
        hidden_act: "gelu_pytorch_tanh",
        tie_word_embeddings: true,
        max_position_embeddings: 8192,
        ..Defaults::LLAMA
    },
    forward: Forward { norm_weight_plus_one: true, embedding_scale: EmbeddingScale::SqrtHiddenSize, ..Forward::LLAMA },
    ..Family::LLAMA
};
