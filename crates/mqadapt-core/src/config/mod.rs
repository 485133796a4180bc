//! `config.json`: in the text of the file, out a [`ModelConfig`] that later code can trust.

mod fields;
mod regime;
mod rewrite;
mod rope;
mod tensors;
mod windows;

use serde_json::Value;

use crate::family::{self, AttentionBias, EmbeddingScale, Family, MlpKind, Rotary};
use crate::{Error, Result};
use fields::Fields;
pub use regime::RopeRegime;
pub use rope::{Rope, RopeScaling};
pub use tensors::ExpectedTensor;

/// Type of the weights that are computed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 16-bit float of IEEE 754.
    F16,
    /// The upper half of a 32-bit float.
    BF16,
}

impl DType {
    /// Bytes of one value.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
        }
    }

    /// Its name in `config.json` and on our command line: `float32`, `float16`, `bfloat16`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::F16 => "float16",
            Self::BF16 => "bfloat16",
        }
    }

    /// Reads `float32`/`f32`, `float16`/`f16`, `bfloat16`/`bf16`.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "float32" | "f32" | "torch.float32" => Some(Self::F32),
            "float16" | "f16" | "torch.float16" => Some(Self::F16),
            "bfloat16" | "bf16" | "torch.bfloat16" => Some(Self::BF16),
            _ => None,
        }
    }
}

/// The activation of the MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// GELU, tanh approximation.
    GeluTanh,
    /// GELU with the error function.
    Gelu,
}

/// What a checkpoint stores, where `config.json` alone does not tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// What stands in front of `layers.N` in the names of its tensors: `model.`, or nothing in a base model (`LlamaModel`).
    pub prefix: &'static str,
    /// There is an output projection, which may be the embeddings. Only a base model can be without.
    pub lm_head: bool,
}

/// A validated model configuration: every size is positive, consistent and small enough to compute with.
#[derive(Debug, Clone)]
#[allow(clippy::struct_excessive_bools)] // the fields of config.json
pub struct ModelConfig {
    /// The family.
    pub family: &'static Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the MLP; 0 where a family without a forward pass has none.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads of every layer.
    pub num_attention_heads: usize,
    /// K/V heads of each layer; each divides `num_attention_heads`.
    pub num_key_value_heads: Vec<usize>,
    /// Values per head; not always `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Tokens of the vocabulary.
    pub vocab_size: usize,
    /// Longest context the model was trained for.
    pub max_position_embeddings: usize,
    /// Epsilon of the norms.
    pub rms_norm_eps: f64,
    /// Rotary position embedding of each layer; `None`: not rotated.
    pub rope: Vec<Option<Rope>>,
    /// The output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// `q_proj`, `k_proj`, `v_proj` have a bias.
    pub qkv_bias: bool,
    /// `o_proj` has a bias.
    pub o_bias: bool,
    /// `gate_proj`, `up_proj`, `down_proj` have a bias.
    pub mlp_bias: bool,
    /// Attention and MLP read the same residual stream.
    pub parallel_residual: bool,
    /// The activation of the MLP.
    pub hidden_act: Activation,
    /// Attention window of each layer in tokens, the token itself included; `None`: all that came before.
    pub sliding_window: Vec<Option<usize>>,
    /// Factor on the logits of the attention.
    pub attention_scale: f64,
    /// Factor on the embeddings, where the family has it in a field (`embedding_multiplier`); else 1.
    pub embedding_multiplier: f64,
    /// Factor on what attention and MLP add to the residual stream.
    pub residual_multiplier: f64,
    /// Divisor of the model's logits.
    pub logits_scaling: f64,
    /// Bound of the attention's logits.
    pub attn_logit_softcapping: Option<f64>,
    /// Bound of the model's logits.
    pub final_logit_softcapping: Option<f64>,
    /// Standard deviation of freshly initialised weights.
    pub initializer_range: f64,
    /// Type of the stored weights, if the file tells.
    pub dtype: Option<DType>,
    /// What the checkpoint stores; of a `config.json` alone, what a `...ForCausalLM` does.
    pub stored: Stored,
    /// The file as read, for writing it back.
    pub json: Value,
}

impl ModelConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// [`Error::Syntax`], [`Error::UnknownModelType`], or [`Error::Config`] naming the first field that cannot be.
    pub fn from_json(text: &str) -> Result<Self> {
        let value =
            serde_json::from_str(text).map_err(|e| Error::Syntax { what: "config.json", detail: e.to_string() })?;
        Self::from_value(value)
    }

    /// Reads a parsed `config.json`.
    ///
    /// # Errors
    /// As [`Self::from_json`].
    pub fn from_value(json: Value) -> Result<Self> {
        let fields = Fields::new(&json)?;
        let model_type = fields.text("model_type")?.ok_or_else(|| fields.missing("model_type"))?;
        let family = fields.as_written(family::of(model_type)?);
        let fields = fields.of(family);
        fields.refuse_unsupported(family)?;
        let text = fields.get("text_config").filter(|_| family.text_config);
        let fields = text.map_or(Ok(fields), Fields::new)?;
        let (defaults, runnable) = (&family.defaults, family.runnable);

        let hidden_size = fields.required_size("hidden_size")?;
        let given = fields.size("num_attention_heads")?.or(defaults.num_attention_heads);
        let num_attention_heads = given.ok_or_else(|| fields.missing("num_attention_heads"))?;
        let num_hidden_layers = fields.required_size("num_hidden_layers")?;
        let head_dim = match (fields.size("head_dim")?, defaults.head_dim) {
            (Some(found), _) => found,
            (None, Some(default)) => default,
            (None, None) if hidden_size.is_multiple_of(num_attention_heads) => hidden_size / num_attention_heads,
            (None, None) => {
                let detail = format!(
                    "is absent, and hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}"
                );
                return Err(Error::Config { field: "head_dim".to_owned(), detail });
            }
        };
        let learned = family.forward.rotary == Rotary::Learned;
        // the classes of GPT-2 and its like have no such field
        let derived = family.merged.is_some() || family.stock_key_value_heads.is_some();
        if derived && head_dim.checked_mul(num_attention_heads) != Some(hidden_size) {
            return Err(fields.wrong("head_dim", "absent, or hidden_size / num_attention_heads"));
        }
        if !learned && !head_dim.is_multiple_of(2) {
            return Err(fields.wrong("head_dim", "an even number (RoPE rotates pairs)"));
        }
        let num_key_value_heads = fields.num_key_value_heads(family, num_hidden_layers, num_attention_heads)?;
        let bias = |field, read: bool| Ok(read && fields.flag(field)?.unwrap_or(false));
        let (qkv_bias, o_bias) = match family.forward.attention_bias {
            AttentionBias::Never => (false, false),
            AttentionBias::Qkv => (true, false),
            AttentionBias::Always => (true, true),
            AttentionBias::UnlessField => {
                let all = fields.flag("attention_bias")?.unwrap_or(true);
                (all, all)
            }
            AttentionBias::ByField => {
                let all = bias("attention_bias", true)?;
                (all, all)
            }
        };
        let max_position_embeddings =
            fields.size("max_position_embeddings")?.unwrap_or(defaults.max_position_embeddings);
        let (windows, rope) = if runnable {
            let (windows, slides) = fields.sliding_windows(family, num_hidden_layers)?;
            (windows, rope::of_layers(&fields, family, head_dim, max_position_embeddings, &slides)?)
        } else {
            (vec![None; num_hidden_layers], vec![None; num_hidden_layers])
        };
        let size = |field| if runnable { fields.required_size(field) } else { Ok(fields.size(field)?.unwrap_or(0)) };
        let intermediate_size = match (fields.get("intermediate_size"), defaults.intermediate_factor) {
            (None, Some(factor)) => factor * hidden_size,
            _ => size("intermediate_size")?,
        };
        let multiplier = |field, read: bool| Ok(if read { fields.positive(field)?.unwrap_or(1.0) } else { 1.0 });
        let forward = &family.forward;

        Ok(Self {
            family,
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: size("vocab_size")?,
            max_position_embeddings,
            rms_norm_eps: fields.positive("rms_norm_eps")?.unwrap_or(defaults.rms_norm_eps),
            rope,
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(defaults.tie_word_embeddings),
            qkv_bias,
            o_bias,
            mlp_bias: forward.mlp == MlpKind::Plain || bias("mlp_bias", forward.mlp_bias)?,
            parallel_residual: forward.parallel_residual && fields.flag("use_parallel_residual")?.unwrap_or(true),
            hidden_act: if runnable { fields.activation(family)? } else { Activation::Silu },
            sliding_window: windows,
            attention_scale: fields.attention_scale(forward.attention_scale, head_dim)?,
            embedding_multiplier: multiplier(
                "embedding_multiplier",
                forward.embedding_scale == EmbeddingScale::Multiplier,
            )?,
            residual_multiplier: multiplier("residual_multiplier", forward.multipliers)?,
            logits_scaling: multiplier("logits_scaling", forward.multipliers)?,
            attn_logit_softcapping: fields.softcapping("attn_logit_softcapping", forward.attn_logit_softcapping)?,
            final_logit_softcapping: fields.softcapping("final_logit_softcapping", forward.final_logit_softcapping)?,
            initializer_range: fields.positive("initializer_range")?.unwrap_or(0.02),
            dtype: fields.dtype(),
            stored: Stored { prefix: family.names.prefix, lm_head: true },
            json,
        })
    }

    /// Positions that have an embedding, where they are learned.
    #[must_use]
    pub fn learned_positions(&self) -> Option<usize> {
        (self.family.forward.rotary == Rotary::Learned).then_some(self.max_position_embeddings)
    }

    /// The regime of a text of this many tokens: what transformers rotates by where it reads the whole text at once.
    #[must_use]
    pub fn rope_regime(&self, tokens: usize) -> RopeRegime {
        // the longest of the layers' is on the same side of every layer's context as the text is
        RopeRegime(self.rope.iter().flatten().map(|rope| rope.shortest_alike(tokens)).max().unwrap_or(0))
    }

    /// The context beyond which the rotary frequencies depend on the length of the text (`dynamic`, `longrope`).
    #[must_use]
    pub fn original_context(&self) -> Option<usize> {
        self.rope.iter().flatten().filter_map(Rope::original_context).min()
    }

    /// Query heads that share one K/V head in a layer.
    #[must_use]
    pub fn num_key_value_groups(&self, layer_idx: usize) -> usize {
        self.num_attention_heads / self.num_key_value_heads[layer_idx]
    }

    /// The same model with other K/V-head counts, its `json` rewritten as transformers 4.57 and 5 read it
    /// (`modeling_file` is the module that `auto_map` names where layers differ, without `.py`).
    #[must_use]
    pub fn with_num_key_value_heads(&self, heads: &[usize], modeling_file: &str) -> Self {
        let mut out = self.clone();
        out.num_key_value_heads = heads.to_vec();
        if let Some(merged) = self.family.merged.filter(|_| heads != self.num_key_value_heads) {
            out.family = merged;
        }
        out.json = rewrite::rewrite(self, out.family, heads, modeling_file);
        out
    }
}

#[cfg(test)]
mod tests;
