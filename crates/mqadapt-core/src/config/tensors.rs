//! The tensors of a model: which there are, their shapes, and their names in its files.

use std::borrow::Cow;

use super::ModelConfig;
use crate::family::{
    BlockNorms, EMBED_POSITIONS, EMBED_TOKENS, LM_HEAD, LayerTensor, MlpKind, Module, NORM, NORM_BIAS, NormKind, QkNorm,
};

/// A tensor that a model of this configuration has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Its name in a Hugging Face checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl ModelConfig {
    /// Every tensor that a checkpoint of this model must have, in the order of the forward pass; of a family without one those
    /// that a method reads: the projections of the attention. `lm_head.weight` only where the embeddings are not tied, and the checkpoint has one.
    #[must_use]
    pub fn tensors(&self) -> Vec<ExpectedTensor> {
        let runnable = self.family.runnable;
        let table = |name: &str, rows| ExpectedTensor { name: name.to_owned(), shape: vec![rows, self.hidden_size] };
        let mut out: Vec<_> = runnable.then(|| table(EMBED_TOKENS, self.vocab_size)).into_iter().collect();
        out.extend(self.learned_positions().map(|positions| table(EMBED_POSITIONS, positions)));
        for layer_idx in 0..self.num_hidden_layers {
            for module in Module::ALL.into_iter().filter(|module| runnable || module.is_attention_projection()) {
                let Some(shape) = self.weight_shape(layer_idx, module) else { continue };
                let bias = shape.first().copied().filter(|_| self.has_bias(module));
                out.push(ExpectedTensor { name: LayerTensor::weight(layer_idx, module).name(), shape });
                if let Some(out_features) = bias {
                    out.push(ExpectedTensor {
                        name: LayerTensor::bias(layer_idx, module).name(),
                        shape: vec![out_features],
                    });
                }
            }
        }
        if runnable {
            for name in [NORM, NORM_BIAS].into_iter().take(if self.norm_bias() { 2 } else { 1 }) {
                out.push(ExpectedTensor { name: name.to_owned(), shape: vec![self.hidden_size] });
            }
            out.extend((!self.tie_word_embeddings && self.stored.lm_head).then(|| table(LM_HEAD, self.vocab_size)));
        }
        out
    }

    /// The name in the checkpoint's own files of the tensor that holds what a Llama's `...ForCausalLM` calls `role`.
    #[must_use]
    pub fn stored_name<'a>(&self, role: &'a str) -> Cow<'a, str> {
        if role == LM_HEAD {
            return Cow::Owned(self.family.lm_head_name());
        }
        match self.family.name_below_prefix(role) {
            Some(name) => Cow::Owned(format!("{}{name}", self.stored.prefix)),
            None => Cow::Borrowed(role),
        }
    }

    /// Norms have a bias.
    #[must_use]
    pub fn norm_bias(&self) -> bool {
        self.family.forward.norm == NormKind::Layer
    }

    /// Shape of a module's weight in one layer; `None` where the family has no such module.
    #[must_use]
    pub fn weight_shape(&self, layer_idx: usize, module: Module) -> Option<Vec<usize>> {
        let query = self.num_attention_heads * self.head_dim;
        let key_value = self.num_key_value_heads.get(layer_idx)? * self.head_dim;
        let (norms, qk_norm) = (self.family.forward.block_norms, self.family.forward.qk_norm);
        Some(match module {
            Module::InputLayernorm if norms == BlockNorms::Behind => return None,
            Module::PreFeedforwardLayernorm if norms != BlockNorms::Around => return None,
            Module::PostFeedforwardLayernorm if norms == BlockNorms::Before => return None,
            Module::InputLayernorm
            | Module::PostAttentionLayernorm
            | Module::PreFeedforwardLayernorm
            | Module::PostFeedforwardLayernorm => vec![self.hidden_size],
            Module::QProj => vec![query, self.hidden_size],
            Module::KProj | Module::VProj => vec![key_value, self.hidden_size],
            Module::OProj => vec![self.hidden_size, query],
            Module::QNorm | Module::KNorm if qk_norm == QkNorm::None => return None,
            Module::QNorm if qk_norm == QkNorm::Layer => vec![query],
            Module::KNorm if qk_norm == QkNorm::Layer => vec![key_value],
            Module::QNorm | Module::KNorm => vec![self.head_dim],
            Module::GateProj if self.family.forward.mlp == MlpKind::Plain => return None,
            Module::GateProj | Module::UpProj => vec![self.intermediate_size, self.hidden_size],
            Module::DownProj => vec![self.hidden_size, self.intermediate_size],
        })
    }

    /// Whether a module has a bias.
    #[must_use]
    pub fn has_bias(&self, module: Module) -> bool {
        match module {
            Module::QProj | Module::KProj | Module::VProj => self.qkv_bias,
            Module::OProj => self.o_bias,
            Module::GateProj | Module::UpProj | Module::DownProj => self.mlp_bias,
            _ => self.norm_bias(),
        }
    }

    /// Whether the rows of a module belong to K/V heads: those of two projections, and of a norm over all heads.
    #[must_use]
    pub fn has_key_value_rows(&self, module: Module) -> bool {
        module.is_key_value() || (module == Module::KNorm && self.family.forward.qk_norm == QkNorm::Layer)
    }
}
