//! The model families: how their tensors are named and what their forward pass does differently.
//!
//! A family is one file and one line in [`FAMILIES`].

mod gemma;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;

/// Every family that can be converted and run.
pub static FAMILIES: &[&Family] = &[&llama::FAMILY, &gemma::FAMILY, &mistral::FAMILY, &qwen2::FAMILY, &qwen3::FAMILY];

/// A family of decoder-only transformers with the tensor names of Hugging Face's Llama.
#[derive(Debug)]
pub struct Family {
    /// `model_type` of its `config.json`.
    pub model_type: &'static str,
    /// Prefix of its transformers classes: `Llama` of `LlamaForCausalLM`.
    pub class_prefix: &'static str,
    /// Fields that a `config.json` may leave out.
    pub defaults: Defaults,
    /// What the forward pass does differently.
    pub forward: Forward,
}

/// Values of fields that a `config.json` may leave out (the defaults of the family's `configuration_*.py`).
#[derive(Debug)]
pub struct Defaults {
    /// `num_key_value_heads` where the field is absent (`null` is `num_attention_heads`); `None`: `num_attention_heads`.
    pub num_key_value_heads: Option<usize>,
    /// `head_dim`; `None`: `hidden_size / num_attention_heads`.
    pub head_dim: Option<usize>,
    /// `hidden_act`.
    pub hidden_act: &'static str,
    /// `rms_norm_eps`.
    pub rms_norm_eps: f64,
    /// `rope_theta`.
    pub rope_theta: f64,
    /// `tie_word_embeddings`.
    pub tie_word_embeddings: bool,
    /// `max_position_embeddings`.
    pub max_position_embeddings: usize,
    /// `sliding_window` where the field is absent (`null` is none).
    pub sliding_window: Option<usize>,
    /// Whether `sliding_window` counts only together with `use_sliding_window` (Qwen).
    pub sliding_window_needs_flag: bool,
}

/// What a family's forward pass does differently from Llama's.
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools)] // independent switches
pub struct Forward {
    /// Norms multiply by `1 + weight` (Gemma).
    pub norm_weight_plus_one: bool,
    /// Embeddings are multiplied by `sqrt(hidden_size)`, rounded to the weights' dtype (Gemma).
    pub scale_embeddings: bool,
    /// RMS norm over `head_dim` on queries and keys before `RoPE` (Qwen3).
    pub qk_norm: bool,
    /// Which attention projections have a bias.
    pub attention_bias: AttentionBias,
    /// The MLP has biases where `mlp_bias` says so; the other families ignore that field.
    pub mlp_bias: bool,
}

/// Which attention projections of a family have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionBias {
    /// None, whatever `attention_bias` says (Mistral).
    Never,
    /// `q_proj`, `k_proj`, `v_proj`, whatever `attention_bias` says (Qwen2).
    Qkv,
    /// All four where `attention_bias` is true.
    ByField,
}

/// A module of a decoder layer that owns tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the checkpoint's own names
pub enum Module {
    InputLayernorm,
    QProj,
    KProj,
    VProj,
    OProj,
    QNorm,
    KNorm,
    PostAttentionLayernorm,
    GateProj,
    UpProj,
    DownProj,
}

impl Module {
    /// All of them, in the order of the forward pass.
    pub const ALL: [Self; 11] = [
        Self::InputLayernorm,
        Self::QProj,
        Self::KProj,
        Self::VProj,
        Self::OProj,
        Self::QNorm,
        Self::KNorm,
        Self::PostAttentionLayernorm,
        Self::GateProj,
        Self::UpProj,
        Self::DownProj,
    ];

    /// Whether its rows belong to K/V heads.
    #[must_use]
    pub fn is_key_value(self) -> bool {
        matches!(self, Self::KProj | Self::VProj)
    }

    /// Its name in a checkpoint, below `model.layers.N.`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::InputLayernorm => "input_layernorm",
            Self::QProj => "self_attn.q_proj",
            Self::KProj => "self_attn.k_proj",
            Self::VProj => "self_attn.v_proj",
            Self::OProj => "self_attn.o_proj",
            Self::QNorm => "self_attn.q_norm",
            Self::KNorm => "self_attn.k_norm",
            Self::PostAttentionLayernorm => "post_attention_layernorm",
            Self::GateProj => "mlp.gate_proj",
            Self::UpProj => "mlp.up_proj",
            Self::DownProj => "mlp.down_proj",
        }
    }
}

/// A tensor of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LayerTensor {
    /// The layer.
    pub layer_idx: usize,
    /// The module that owns it.
    pub module: Module,
    /// A bias (`[out_features]`), not a weight.
    pub bias: bool,
}

impl LayerTensor {
    /// The weight of a module.
    #[must_use]
    pub fn weight(layer_idx: usize, module: Module) -> Self {
        Self { layer_idx, module, bias: false }
    }

    /// The bias of a module.
    #[must_use]
    pub fn bias(layer_idx: usize, module: Module) -> Self {
        Self { layer_idx, module, bias: true }
    }

    /// Its name in a checkpoint.
    #[must_use]
    pub fn name(self) -> String {
        let part = if self.bias { "bias" } else { "weight" };
        format!("model.layers.{}.{}.{part}", self.layer_idx, self.module.name())
    }

    /// The tensor that a checkpoint's name stands for; `None` for names outside the decoder layers or unknown ones.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let (module, part) = rest.rsplit_once('.')?;
        let module = Module::ALL.into_iter().find(|candidate| candidate.name() == module)?;
        let bias = match part {
            "weight" => false,
            "bias" => true,
            _ => return None,
        };
        let parsed = Self { layer_idx: layer.parse().ok()?, module, bias };
        // "+1" and "01" parse as numbers but are not names that a checkpoint uses
        (parsed.name() == name).then_some(parsed)
    }
}

/// What a base model (`LlamaModel`, not `LlamaForCausalLM`) leaves out in front of its tensors' names.
pub const BASE_MODEL_PREFIX: &str = "model.";
/// Name of the token embedding, `[vocab_size, hidden_size]`.
pub const EMBED_TOKENS: &str = "model.embed_tokens.weight";
/// Name of the final norm, `[hidden_size]`.
pub const NORM: &str = "model.norm.weight";
/// Name of the output projection, `[vocab_size, hidden_size]`; absent when the embeddings are tied.
pub const LM_HEAD: &str = "lm_head.weight";

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
