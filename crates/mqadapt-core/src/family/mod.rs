//! The model families as data: how their tensors are named and what their forward pass does differently.
//!
//! A family is one file and one line in [`FAMILIES`].

mod forward;
mod gemma;
mod gemma2;
mod gemma3;
mod gemma3_text;
mod gpt2;
mod gpt_bigcode;
mod gpt_neox;
mod gpt_oss;
mod granite;
mod llama;
mod mistral;
mod mistral3;
mod mixtral;
mod names;
mod olmo2;
mod olmo3;
mod phi3;
mod qwen2;
mod qwen2_5_vl;
mod qwen3;
mod qwen3_moe;
mod registered;
mod smollm3;
mod starcoder2;
mod tensor;

pub use forward::{
    AttentionBias, AttentionScale, BlockNorms, EmbeddingScale, Forward, MlpKind, NormKind, QkNorm, Rotary, Softcapping,
    Windows,
};
pub use names::Names;
pub(crate) use registered::of;
pub use registered::{known, register, registered};
pub use tensor::{EMBED_POSITIONS, EMBED_TOKENS, Fused, LM_HEAD, LayerTensor, Module, NORM, NORM_BIAS, PREFIX};

/// Every family that can be converted.
pub static FAMILIES: &[&Family] = &[
    &llama::FAMILY,
    &gemma::FAMILY,
    &gemma2::FAMILY,
    &gemma3_text::FAMILY,
    &gpt2::FAMILY,
    &gpt_bigcode::FAMILY,
    &gpt_neox::FAMILY,
    &granite::FAMILY,
    &mistral::FAMILY,
    &olmo2::FAMILY,
    &olmo3::FAMILY,
    &phi3::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &smollm3::FAMILY,
    &starcoder2::FAMILY,
    &gemma3::FAMILY,
    &gpt_oss::FAMILY,
    &mistral3::FAMILY,
    &mixtral::FAMILY,
    &qwen2_5_vl::FAMILY,
    &qwen3_moe::FAMILY,
];

/// A family of decoder-only transformers.
#[derive(Debug)]
pub struct Family {
    /// `model_type` of its `config.json`.
    pub model_type: &'static str,
    /// Prefix of its transformers classes: `Llama` of `LlamaForCausalLM`.
    pub class_prefix: &'static str,
    /// Its transformers class without an output projection: `LlamaModel`.
    pub base_model: &'static str,
    /// Fields that a `config.json` may leave out.
    pub defaults: Defaults,
    /// Fields of its `config.json` that have another name than Llama's: Llama's, and its own.
    pub field_names: &'static [(&'static str, &'static str)],
    /// Fields that have this value or are absent, as others are not followed. A conversion into this family writes them.
    pub requires: &'static [(&'static str, bool)],
    /// What its files call its tensors.
    pub names: Names,
    /// What stands in front of `layers.N` in the names of its tensors, beside [`Names::prefix`] and nothing at all.
    pub prefixes: &'static [&'static str],
    /// Tensors of its files that hold several modules.
    pub fused: &'static [Fused],
    /// The matrices of its layers are stored `[in_features, out_features]`.
    pub transposed: bool,
    /// The only number of K/V heads, alike in every layer, that its class in transformers computes with; 0: none.
    /// `None`: any. Others are written with our modelling file.
    pub stock_key_value_heads: Option<usize>,
    /// The family whose files hold the result where K/V heads are merged; `None`: its own. Its files have as many K/V heads as
    /// query heads.
    pub merged: Option<&'static Family>,
    /// What the forward pass does differently; of a family that is not `runnable`, its attention alone is described.
    pub forward: Forward,
    /// There is a forward pass for it. A family without one can be converted by methods that read no text.
    pub runnable: bool,
    /// The fields of the language model stand under `text_config`, where there is one.
    pub text_config: bool,
    /// Values of `quant_method` by which no attention weights are quantised.
    pub attention_kept_by: &'static [&'static str],
}

impl Family {
    /// Llama: `transformers/models/llama/configuration_llama.py` and `modeling_llama.py`.
    pub const LLAMA: Self = Self {
        model_type: "llama",
        class_prefix: "Llama",
        base_model: "LlamaModel",
        defaults: Defaults::LLAMA,
        field_names: &[],
        requires: &[],
        names: Names::LLAMA,
        prefixes: &[],
        fused: &[],
        transposed: false,
        stock_key_value_heads: None,
        merged: None,
        forward: Forward { mlp_bias: true, ..Forward::LLAMA },
        runnable: true,
        text_config: false,
        attention_kept_by: &[],
    };

    /// The tensor of its files that holds a module among others.
    #[must_use]
    pub fn fused_with(&self, module: Module) -> Option<&'static Fused> {
        self.fused.iter().find(|fused| fused.modules.contains(&module))
    }
}

/// Values of fields that a `config.json` may leave out (the defaults of the family's `configuration_*.py`).
#[derive(Debug)]
pub struct Defaults {
    /// `num_attention_heads`; `None`: the field is required.
    pub num_attention_heads: Option<usize>,
    /// `num_key_value_heads` where the field is absent (`null` is `num_attention_heads`); `None`: `num_attention_heads`.
    pub num_key_value_heads: Option<usize>,
    /// `head_dim`; `None`: `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// `intermediate_size`, as a multiple of `hidden_size`; `None`: the field is required.
    pub intermediate_factor: Option<usize>,
    /// The activation of the MLP.
    pub hidden_act: &'static str,
    /// `rms_norm_eps`.
    pub rms_norm_eps: f64,
    /// `rope_theta`.
    pub rope_theta: f64,
    /// `tie_word_embeddings`.
    pub tie_word_embeddings: bool,
    /// `max_position_embeddings`.
    pub max_position_embeddings: usize,
    /// `original_max_position_embeddings`; `None`: `max_position_embeddings`.
    pub original_max_position_embeddings: Option<f64>,
    /// `sliding_window` where the field is absent (`null` is none).
    pub sliding_window: Option<usize>,
}

impl Defaults {
    /// Llama's: `transformers/models/llama/configuration_llama.py`.
    pub const LLAMA: Self = Self {
        num_attention_heads: None,
        num_key_value_heads: None,
        head_dim: None,
        intermediate_factor: None,
        hidden_act: "silu",
        rms_norm_eps: 1e-6,
        rope_theta: 10_000.0,
        tie_word_embeddings: false,
        max_position_embeddings: 2048,
        original_max_position_embeddings: None,
        sliding_window: None,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for module in Module::ALL {
            for bias in [false, true] {
                let tensor = LayerTensor { layer_idx: 12, module, bias };
                assert_eq!(LayerTensor::parse(&tensor.name()), Some(tensor));
            }
        }
        for odd in [
            "model.layers.01.mlp.up_proj.weight",
            "model.layers.+1.mlp.up_proj.weight",
            "model.layers.1.mlp.weight",
            NORM,
        ] {
            assert_eq!(LayerTensor::parse(odd), None, "{odd}");
        }
    }

    #[test]
    fn model_types_are_unique() {
        for (i, family) in FAMILIES.iter().enumerate() {
            assert!(FAMILIES[..i].iter().all(|other| other.model_type != family.model_type));
        }
    }
}
