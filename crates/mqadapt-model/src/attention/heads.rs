//! Attention that caches K/V heads. In: the normed rows of a batch; out: what `o_proj` reads.

use std::sync::Arc;

use mqadapt_core::AttentionShape;

use crate::backend::{Backend, Linear, Norm};
use crate::error::Result;
use crate::rope::RopeTable;
use crate::run::batch::Batch;
use crate::workspace::Workspace;

/// Grouped attention with rotary embedding.
pub(crate) struct Attention<B: Backend> {
    pub shape: AttentionShape,
    pub q_proj: Linear<B>,
    pub k_proj: Linear<B>,
    pub v_proj: Linear<B>,
    pub o_proj: Linear<B>,
    /// `[head_dim]`
    pub q_norm: Option<Arc<Norm<B>>>,
    /// `[head_dim]`
    pub k_norm: Option<Arc<Norm<B>>>,
}

impl<B: Backend> Attention<B> {
    /// `normed` to `q`, `k`, `v`, before `RoPE`.
    pub(crate) fn project(&self, backend: &B, eps: f32, ws: &mut Workspace<B>) -> Result<()> {
        let layers = [&self.q_proj, &self.k_proj, &self.v_proj];
        backend.project(&ws.normed, layers, [&mut ws.q, &mut ws.k, &mut ws.v])?;
        if let Some(norm) = &self.q_norm {
            backend.norm_heads(&mut ws.q, norm, eps)?;
        }
        if let Some(norm) = &self.k_norm {
            backend.norm_heads(&mut ws.k, norm, eps)?;
        }
        Ok(())
    }

    /// `q`, `k`, `v` to `attention`.
    pub(crate) fn attend(
        &self,
        backend: &B,
        rope: &RopeTable,
        batch: &Batch,
        cache: &mut B::Cache,
        ws: &mut Workspace<B>,
    ) -> Result<()> {
        if rope.pairs > 0 {
            backend.rope(&mut ws.q, self.shape.head_dim, rope, batch)?;
            backend.rope(&mut ws.k, self.shape.head_dim, rope, batch)?;
        }
        backend.store(&ws.k, &ws.v, &self.shape, batch, cache)?;
        backend.attend(&ws.q, &self.shape, batch, cache, &mut ws.attention)
    }
}
