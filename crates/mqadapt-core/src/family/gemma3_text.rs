//! The text models of Gemma 3: `transformers/models/gemma3/configuration_gemma3.py` and `modeling_gemma3.py`.

use super::{
    AttentionScale, BlockNorms, Defaults, EmbeddingScale, Family, Forward, QkNorm, Rotary, Softcapping, Windows,
};

pub(super) static FAMILY: Family = TEXT;

/// The language model, alone or beside one for images.
pub(super) const TEXT: Family = Family {
    model_type: "gemma3_text",
    class_prefix: "Gemma3",
    base_model: "Gemma3TextModel",
    defaults: Defaults {
        num_attention_heads: Some(8),
        num_key_value_heads: Some(4),
        head_dim: Some(256),
        hidden_act: "gelu_pytorch_tanh",
        rope_theta: 1_000_000.0,
        tie_word_embeddings: true,
        max_position_embeddings: 131_072,
        sliding_window: Some(4096),
        ..Defaults::LLAMA
    },
    forward: Forward {
        norm_weight_plus_one: true,
        block_norms: BlockNorms::Around,
        qk_norm: QkNorm::Head,
        embedding_scale: EmbeddingScale::SqrtHiddenSize,
        attention_scale: AttentionScale::QueryPreAttnScalar(256.0),
        final_logit_softcapping: Softcapping::Field(None),
        windows: Windows::Pattern { full_every: 6, field: Some("sliding_window_pattern") },
        rotary: Rotary::ByKind { local_theta: 10_000.0, local_field: Some("rope_local_base_freq") },
        activation_field: "hidden_activation",
        ..Forward::LLAMA
    },
    ..Family::LLAMA
};
