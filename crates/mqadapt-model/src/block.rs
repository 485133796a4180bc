//! A decoder layer and its MLP.

use std::sync::Arc;

use mqadapt_core::Activation;

use crate::attention::Attention;
use crate::backend::{Backend, Linear, Norm};
use crate::error::Result;
use crate::workspace::Workspace;

/// The MLP.
pub(crate) struct Mlp<B: Backend> {
    /// `None`: it is not gated.
    pub gate_proj: Option<Linear<B>>,
    pub up_proj: Linear<B>,
    pub down_proj: Linear<B>,
    pub hidden_act: Activation,
}

/// The norms of a decoder layer, by their place: families have some of them, under different names
/// ([`mqadapt_core::family::BlockNorms`]).
pub(crate) struct Norms<B: Backend> {
    pub before_attention: Option<Norm<B>>,
    /// On what attention adds to the residual stream.
    pub behind_attention: Option<Norm<B>>,
    pub before_mlp: Option<Norm<B>>,
    /// On what the MLP adds to the residual stream.
    pub behind_mlp: Option<Norm<B>>,
}

/// A decoder layer.
pub(crate) struct Block<B: Backend> {
    pub norms: Arc<Norms<B>>,
    pub self_attn: Attention<B>,
    pub mlp: Arc<Mlp<B>>,
    pub eps: f32,
    /// Factor on what attention and MLP add to the residual stream.
    pub residual_multiplier: f32,
    /// The MLP reads what attention reads, not what it adds to.
    pub parallel: bool,
}

impl<B: Backend> Block<B> {
    /// `hidden` to `normed`, which attention reads.
    pub(crate) fn enter(&self, backend: &B, ws: &mut Workspace<B>) -> Result<()> {
        self.norm(backend, self.norms.before_attention.as_ref(), ws)
    }

    /// From `hidden` and `attention` to the `hidden` behind the layer.
    pub(crate) fn leave(&self, backend: &B, ws: &mut Workspace<B>) -> Result<()> {
        if self.parallel {
            self.norm(backend, self.norms.before_mlp.as_ref(), ws)?;
        }
        self.add(
            backend,
            &ws.attention,
            &self.self_attn.o_proj,
            self.norms.behind_attention.as_ref(),
            (&mut ws.output, &mut ws.hidden),
        )?;
        if !self.parallel {
            self.norm(backend, self.norms.before_mlp.as_ref(), ws)?;
        }
        let mlp = &self.mlp;
        match &mlp.gate_proj {
            Some(gate) => backend.gated(&ws.normed, gate, &mlp.up_proj, mlp.hidden_act, &mut ws.intermediate)?,
            None => backend.activated(&ws.normed, &mlp.up_proj, mlp.hidden_act, &mut ws.intermediate)?,
        }
        self.add(
            backend,
            &ws.intermediate,
            &mlp.down_proj,
            self.norms.behind_mlp.as_ref(),
            (&mut ws.output, &mut ws.hidden),
        )
    }

    fn norm(&self, backend: &B, norm: Option<&Norm<B>>, ws: &mut Workspace<B>) -> Result<()> {
        match norm {
            Some(norm) => backend.norm(&ws.hidden, norm, self.eps, &mut ws.normed),
            None => backend.copy(&ws.hidden, &mut ws.normed),
        }
    }

    /// Adds a linear layer of `x` to `hidden`, through a norm where there is one.
    fn add(
        &self,
        backend: &B,
        x: &B::Buffer,
        linear: &Linear<B>,
        norm: Option<&Norm<B>>,
        (output, hidden): (&mut B::Buffer, &mut B::Buffer),
    ) -> Result<()> {
        if norm.is_none() && self.residual_multiplier == 1.0 {
            return backend.linear_add(x, linear, hidden);
        }
        backend.linear(x, linear, output)?;
        if let Some(norm) = norm {
            backend.norm_heads(output, norm, self.eps)?;
        }
        backend.add(output, self.residual_multiplier, hidden)
    }
}
