//! The shape of one attention. In: a model's configuration; out: what its projections compute and its cache is made of.

use crate::cache::{LayerShape, divisors};
use crate::family::QkNorm;
use crate::{ModelConfig, Rope};

/// What the attention of one layer does with its projections.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub num_attention_heads: usize,
    /// K/V heads; divides `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// Width of the hidden state.
    pub hidden_size: usize,
    /// Rotary frequencies in radians per token, fastest first; pair `j` is the dims `(j, j + inv_freq.len())` of a head. Dims
    /// from `2 * inv_freq.len()` on are not rotated; empty means no rotary embedding. Where they depend on the length of the
    /// text (`dynamic`, `longrope`), those of texts up to the original context.
    pub inv_freq: Vec<f64>,
    /// Factor on rotated queries and keys, on their rotated dims (`YaRN`, `LongRoPE`); 1 for most.
    pub rotary_factor: f64,
    /// Factor on the logits.
    pub scaling: f64,
    /// Queries and keys are normalised after their projection (Qwen3, Gemma 3, OLMo 2).
    pub qk_norm: bool,
    /// A token attends to this many positions, itself included; `None`: to all before it.
    pub sliding_window: Option<usize>,
    /// Bound of the logits: `cap * tanh(logit / cap)` (Gemma 2).
    pub attn_logit_softcapping: Option<f64>,
}

impl AttentionShape {
    /// Query heads that share one K/V head.
    #[must_use]
    pub fn num_key_value_groups(&self) -> usize {
        self.num_attention_heads / self.num_key_value_heads
    }

    /// Rotated pairs per head.
    #[must_use]
    pub fn rotary_pairs(&self) -> usize {
        self.inv_freq.len()
    }

    /// The shape of its cache.
    #[must_use]
    pub fn cache(&self) -> LayerShape {
        LayerShape::Heads { num_key_value_heads: self.num_key_value_heads, head_dim: self.head_dim }
    }

    /// The counts that `num_key_value_heads` can be merged to, ascending: its divisors.
    #[must_use]
    pub fn legal_num_key_value_heads(&self) -> Vec<usize> {
        divisors(self.num_key_value_heads)
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    /// A sentence with the two values that disagree.
    pub fn validate(&self) -> Result<(), String> {
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if heads == 0 || kv == 0 || self.head_dim == 0 || self.hidden_size == 0 {
            return Err("every count must be at least 1".to_owned());
        }
        if !heads.is_multiple_of(kv) {
            return Err(format!("num_attention_heads {heads} is not a multiple of num_key_value_heads {kv}"));
        }
        if 2 * self.rotary_pairs() > self.head_dim {
            return Err(format!("{} rotary pairs do not fit into head_dim {}", self.rotary_pairs(), self.head_dim));
        }
        if !(self.rotary_factor.is_finite() && self.rotary_factor > 0.0) {
            return Err(format!("rotary_factor must be positive, found {}", self.rotary_factor));
        }
        if !(self.scaling.is_finite() && self.scaling > 0.0) {
            return Err(format!("scaling must be positive, found {}", self.scaling));
        }
        if self.sliding_window == Some(0) {
            return Err("sliding_window must be at least 1".to_owned());
        }
        Ok(())
    }
}

impl ModelConfig {
    /// The attention of a layer; `None` beyond the last layer.
    #[must_use]
    pub fn attention(&self, layer_idx: usize) -> Option<AttentionShape> {
        let rope = self.rope.get(layer_idx)?;
        Some(AttentionShape {
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: *self.num_key_value_heads.get(layer_idx)?,
            head_dim: self.head_dim,
            hidden_size: self.hidden_size,
            inv_freq: rope.as_ref().map(Rope::inv_freq).unwrap_or_default(),
            rotary_factor: rope.as_ref().map_or(1.0, Rope::attention_factor),
            scaling: self.attention_scale,
            qk_norm: self.family.forward.qk_norm != QkNorm::None,
            sliding_window: self.sliding_window.get(layer_idx).copied().flatten(),
            attn_logit_softcapping: self.attn_logit_softcapping,
        })
    }
}
