//! What a family computes differently from Llama. In: nothing; out: switches that configuration and forward pass read.

/// What a family's forward pass does differently from Llama's ([`Forward::LLAMA`]).
#[derive(Debug)]
#[allow(clippy::struct_excessive_bools)] // switches
pub struct Forward {
    /// What norms compute.
    pub norm: NormKind,
    /// Norms multiply by `1 + weight` (Gemma).
    pub norm_weight_plus_one: bool,
    /// Where a block has norms.
    pub block_norms: BlockNorms,
    /// RMS norm on queries and keys before `RoPE`.
    pub qk_norm: QkNorm,
    /// Factor on the embeddings.
    pub embedding_scale: EmbeddingScale,
    /// Factor on the logits of the attention.
    pub attention_scale: AttentionScale,
    /// `attn_logit_softcapping` bounds the logits of the attention.
    pub attn_logit_softcapping: Softcapping,
    /// `final_logit_softcapping` bounds the logits of the model.
    pub final_logit_softcapping: Softcapping,
    /// `residual_multiplier` and `logits_scaling` are read (Granite).
    pub multipliers: bool,
    /// Which attention projections have a bias.
    pub attention_bias: AttentionBias,
    /// What the MLP computes.
    pub mlp: MlpKind,
    /// A gated MLP has biases where `mlp_bias` says so; the other families ignore that field.
    pub mlp_bias: bool,
    /// Attention and MLP read the same residual stream, unless `use_parallel_residual` is false (GPT-NeoX).
    pub parallel_residual: bool,
    /// Which layers have a window.
    pub windows: Windows,
    /// How positions are rotated.
    pub rotary: Rotary,
    /// Field with the name of the MLP's activation.
    pub activation_field: &'static str,
}

impl Forward {
    /// Llama's: `transformers/models/llama/modeling_llama.py`.
    pub const LLAMA: Self = Self {
        norm: NormKind::Rms,
        norm_weight_plus_one: false,
        block_norms: BlockNorms::Before,
        qk_norm: QkNorm::None,
        embedding_scale: EmbeddingScale::One,
        attention_scale: AttentionScale::HeadDim,
        attn_logit_softcapping: Softcapping::Never,
        final_logit_softcapping: Softcapping::Never,
        multipliers: false,
        attention_bias: AttentionBias::ByField,
        mlp: MlpKind::Gated,
        mlp_bias: false,
        parallel_residual: false,
        windows: Windows::Never,
        rotary: Rotary::Alike,
        activation_field: "hidden_act",
    };
}

/// What norms compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// The values over their root mean square, times a weight.
    Rms,
    /// The values less their mean, over their standard deviation, times a weight, plus a bias (GPT-2).
    Layer,
}

/// What the MLP computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpKind {
    /// `down(act(gate(x)) * up(x))`.
    Gated,
    /// `down(act(up(x)))`, both with a bias (GPT-2).
    Plain,
}

/// Where a block has norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockNorms {
    /// Before attention (`input_layernorm`) and MLP (`post_attention_layernorm`).
    Before,
    /// Behind both, before their output is added (`post_attention_layernorm`, `post_feedforward_layernorm`; OLMo 2).
    Behind,
    /// Before and behind both (`input_layernorm`, `post_attention_layernorm`, `pre_feedforward_layernorm`,
    /// `post_feedforward_layernorm`; Gemma 2).
    Around,
}

/// RMS norm on queries and keys before `RoPE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Of each head, with one weight of `head_dim` values for all of them (Qwen3).
    Head,
    /// Of all heads together, with a weight as wide as they are (OLMo 2).
    Layer,
}

/// Factor on the embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmbeddingScale {
    /// None.
    One,
    /// `sqrt(hidden_size)`, rounded to the weights' dtype (Gemma).
    SqrtHiddenSize,
    /// The field `embedding_multiplier` (Granite).
    Multiplier,
}

/// Factor on the logits of the attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum AttentionScale {
    /// `head_dim^-0.5`.
    HeadDim,
    /// `query_pre_attn_scalar^-0.5`, with this default (Gemma 2).
    QueryPreAttnScalar(f64),
    /// The field `attention_multiplier`, by default 1 (Granite).
    Multiplier,
    /// `head_dim^-0.5`, unless `scale_attn_weights` is false (GPT-2).
    Flagged,
}

/// Whether logits are bounded: `cap * tanh(logit / cap)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Softcapping {
    /// Never; the field is ignored.
    Never,
    /// By the field's value, this one where it is absent; `null` is no bound.
    Field(Option<f64>),
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
    /// All four unless `attention_bias` is false (gpt-oss).
    UnlessField,
    /// All four (GPT-2).
    Always,
}

/// Which layers have a window of `sliding_window` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windows {
    /// None.
    Never,
    /// All of them, unless `sliding_window` is `null` (Mistral).
    Every,
    /// Where `use_sliding_window` is true: those of `layer_types`, or from `max_window_layers` on (Qwen).
    Flagged,
    /// Those of `layer_types`, or all but every `full_every`-th one (Gemma 2); `field` overrides that number.
    Pattern {
        /// Distance between two layers without a window.
        full_every: usize,
        /// A field that says another distance.
        field: Option<&'static str>,
    },
    /// Where `use_sliding_window` is true: those of `layer_types`, or those without `RoPE` (SmolLM3).
    WithoutRope,
}

/// How positions are rotated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rotary {
    /// Alike in every layer, all dims of a head.
    Alike,
    /// Alike in every layer, the first `partial_rotary_factor` of the dims of a head; `yarn` and `su` mean `longrope` (Phi-3).
    Partial,
    /// Alike in every layer, the first `partial_rotary_factor` of the dims of a head, this one by default (GPT-NeoX).
    Fraction(f64),
    /// Not at all: positions are learned, and added to the embeddings (GPT-2).
    Learned,
    /// By kind of layer: `rope_parameters` has one entry for layers with a window and one for the others (Gemma 3).
    ByKind {
        /// Base of layers with a window, where nothing says it.
        local_theta: f64,
        /// A field of older files with that base.
        local_field: Option<&'static str>,
    },
    /// Not at all where `no_rope_layers` has a 0, or in every `no_rope_layer_interval`-th layer (SmolLM3).
    SomeLayers,
}
