//! A decoder layer and its MLP.

use std::sync::Arc;

use mqadapt_core::Activation;

use crate::attention::Attention;
use crate::backend::{Backend, Linear};
use crate::error::Result;
use crate::workspace::Workspace;

/// The gated MLP.
pub(crate) struct Mlp<B: Backend> {
    pub gate_proj: Linear<B>,
    pub up_proj: Linear<B>,
    pub down_proj: Linear<B>,
    pub hidden_act: Activation,
}

/// A decoder layer.
pub(crate) struct Block<B: Backend> {
    pub input_layernorm: Arc<B::Vector>,
    pub self_attn: Attention<B>,
    pub post_attention_layernorm: Arc<B::Vector>,
    pub mlp: Arc<Mlp<B>>,
}

impl<B: Backend> Mlp<B> {
    /// Adds its output for `normed` to `hidden`.
    pub(crate) fn add(&self, backend: &B, ws: &mut Workspace<B>) -> Result<()> {
        backend.gated(&ws.normed, &self.gate_proj, &self.up_proj, self.hidden_act, &mut ws.intermediate)?;
        backend.linear_add(&ws.intermediate, &self.down_proj, &mut ws.hidden)
    }
}
