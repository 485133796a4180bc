//! Gemma 2: `transformers/models/gemma2/configuration_gemma2.py` and `modeling_gemma2.py`.

use super::{AttentionScale, BlockNorms, Defaults, EmbeddingScale, Family, Forward, Softcapping, Windows};

pub(super) static FAMILY: Family = Family {
    model_type: "gemma2",
    class_prefix: "Gemma2",
    base_model: "Gemma2Model",
    defaults: Defaults {
        num_key_value_heads: Some(4),
        head_dim: Some(256),
        hidden_act: "gelu_pytorch_tanh",
        tie_word_embeddings: true,
        max_position_embeddings: 8192,
        sliding_window: Some(4096),
        ..Defaults::LLAMA
    },
    forward: Forward {
        norm_weight_plus_one: true,
        block_norms: BlockNorms::Around,
        embedding_scale: EmbeddingScale::SqrtHiddenSize,
        attention_scale: AttentionScale::QueryPreAttnScalar(256.0),
        attn_logit_softcapping: Softcapping::Field(Some(50.0)),
        final_logit_softcapping: Softcapping::Field(Some(30.0)),
        windows: Windows::Pattern { full_every: 2, field: None },
        activation_field: "hidden_activation",
        ..Forward::LLAMA
    },
    ..Family::LLAMA
};
