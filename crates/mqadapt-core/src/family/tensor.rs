//! The tensors of a decoder layer by role. In: a role; out: the name that all code uses, Llama's. What a family's files call
//! them otherwise is translated when a checkpoint is opened, see [`Fused`] and [`ModelConfig::stored_name`].
//!
//! [`ModelConfig::stored_name`]: crate::ModelConfig::stored_name

/// A tensor of a checkpoint's files that holds several modules of a layer, one under the other: rows of the first, then rows of
/// the next (Phi-3's `qkv_proj`). An open checkpoint shows each of them as a tensor of its own, and a conversion writes them back
/// as one.
#[derive(Debug, PartialEq, Eq)]
pub struct Fused {
    /// Its name below `model.layers.N.`.
    pub name: &'static str,
    /// The modules, in the order of their rows.
    pub modules: &'static [Module],
    /// The rows of the modules alternate by head: those of the first head of each, then those of the next head (GPT-NeoX).
    pub interleaved: bool,
}

impl Fused {
    /// Its name in a checkpoint.
    #[must_use]
    pub fn tensor_name(&self, layer_idx: usize, bias: bool) -> String {
        tensor_name(layer_idx, self.name, bias)
    }
}

fn tensor_name(layer_idx: usize, module: &str, bias: bool) -> String {
    format!("model.layers.{layer_idx}.{module}.{}", if bias { "bias" } else { "weight" })
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
    PreFeedforwardLayernorm,
    GateProj,
    UpProj,
    DownProj,
    PostFeedforwardLayernorm,
}

impl Module {
    /// All of them, in the order of the forward pass.
    pub const ALL: [Self; 13] = [
        Self::InputLayernorm,
        Self::QProj,
        Self::KProj,
        Self::VProj,
        Self::OProj,
        Self::QNorm,
        Self::KNorm,
        Self::PostAttentionLayernorm,
        Self::PreFeedforwardLayernorm,
        Self::GateProj,
        Self::UpProj,
        Self::DownProj,
        Self::PostFeedforwardLayernorm,
    ];

    /// Whether it is one of the four projections of the attention.
    #[must_use]
    pub fn is_attention_projection(self) -> bool {
        matches!(self, Self::QProj | Self::KProj | Self::VProj | Self::OProj)
    }

    /// Whether it projects to K/V heads.
    #[must_use]
    pub fn is_key_value(self) -> bool {
        matches!(self, Self::KProj | Self::VProj)
    }

    /// Whether it is a norm.
    #[must_use]
    pub fn is_norm(self) -> bool {
        use Module::{
            InputLayernorm, KNorm, PostAttentionLayernorm, PostFeedforwardLayernorm, PreFeedforwardLayernorm, QNorm,
        };
        matches!(
            self,
            InputLayernorm
                | QNorm
                | KNorm
                | PostAttentionLayernorm
                | PreFeedforwardLayernorm
                | PostFeedforwardLayernorm
        )
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
            Self::PreFeedforwardLayernorm => "pre_feedforward_layernorm",
            Self::GateProj => "mlp.gate_proj",
            Self::UpProj => "mlp.up_proj",
            Self::DownProj => "mlp.down_proj",
            Self::PostFeedforwardLayernorm => "post_feedforward_layernorm",
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
        tensor_name(self.layer_idx, self.module.name(), self.bias)
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

/// What stands in front of the names of layers, embedding and final norm. A base model (`LlamaModel`, not `LlamaForCausalLM`)
/// leaves it out, and models that read more than text have more there.
pub const PREFIX: &str = "model.";
/// Name of the token embedding, `[vocab_size, hidden_size]`.
pub const EMBED_TOKENS: &str = "model.embed_tokens.weight";
/// Name of the position embedding, `[max_position_embeddings, hidden_size]`, where positions are learned.
pub const EMBED_POSITIONS: &str = "model.embed_positions.weight";
/// Name of the final norm, `[hidden_size]`.
pub const NORM: &str = "model.norm.weight";
/// Name of the final norm's bias, `[hidden_size]`, where norms have one.
pub const NORM_BIAS: &str = "model.norm.bias";
/// Name of the output projection, `[vocab_size, hidden_size]`; absent when the embeddings are tied.
pub const LM_HEAD: &str = "lm_head.weight";
