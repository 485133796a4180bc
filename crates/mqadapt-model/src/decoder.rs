//! The decoder, written once for every family and every [`Backend`]. In: the rows of a [`Batch`]; out: their residual
//! stream. Its modules carry the names of the checkpoint.

use std::ops::Range;
use std::sync::Arc;

use mqadapt_core::{Activation, AttentionShape, ModelConfig};

use crate::backend::{Backend, Linear};
use crate::batch::Batch;
use crate::error::Result;
use crate::rope::RopeTable;

/// Grouped attention with rotary embedding.
pub(crate) struct Attention<B: Backend> {
    pub shape: AttentionShape,
    pub q_proj: Linear<B>,
    pub k_proj: Linear<B>,
    pub v_proj: Linear<B>,
    pub o_proj: Linear<B>,
    /// `[head_dim]`
    pub q_norm: Option<Arc<B::Vector>>,
    /// `[head_dim]`
    pub k_norm: Option<Arc<B::Vector>>,
}

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

/// The model without what surrounds it: embedding, layers, final norm, output projection.
pub(crate) struct Decoder<B: Backend> {
    pub backend: Arc<B>,
    pub config: ModelConfig,
    /// Factor on the embeddings, rounded as the family rounds it; 1 for most.
    pub embedding_scale: f32,
    pub embed_tokens: Arc<B::Matrix>,
    pub layers: Vec<Arc<Block<B>>>,
    pub norm: Arc<B::Vector>,
    pub lm_head: Arc<B::Matrix>,
}

/// Activations of a pass; one set is reused for every layer and every pass.
pub(crate) struct Workspace<B: Backend> {
    /// The residual stream, `[rows, hidden_size]`.
    pub hidden: B::Buffer,
    /// What a norm gave, `[rows, hidden_size]`.
    pub normed: B::Buffer,
    /// `[rows, num_attention_heads * head_dim]`
    pub q: B::Buffer,
    /// `[rows, num_key_value_heads * head_dim]`
    pub k: B::Buffer,
    /// `[rows, num_key_value_heads * head_dim]`
    pub v: B::Buffer,
    /// What `o_proj` reads, `[rows, num_attention_heads * head_dim]`.
    pub attention: B::Buffer,
    /// What `down_proj` reads, `[rows, intermediate_size]`.
    pub intermediate: B::Buffer,
    /// Rows chosen for `lm_head`, `[chosen, hidden_size]`.
    pub chosen: B::Buffer,
}

impl<B: Backend> Default for Workspace<B> {
    fn default() -> Self {
        Self {
            hidden: B::Buffer::default(),
            normed: B::Buffer::default(),
            q: B::Buffer::default(),
            k: B::Buffer::default(),
            v: B::Buffer::default(),
            attention: B::Buffer::default(),
            intermediate: B::Buffer::default(),
            chosen: B::Buffer::default(),
        }
    }
}

/// Where a pass is when its observer is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Before a layer: `hidden` is what enters it.
    Entering,
    /// Within a layer: `normed`, `q`, `k`, `v` are there, and nothing has been rotated.
    Projected,
    /// Within a layer: `attention` is there.
    Attended,
}

/// Watches a pass, and may end it by an error.
pub(crate) trait Observer<B: Backend> {
    fn at(&mut self, moment: Moment, layer_idx: usize, workspace: &Workspace<B>) -> Result<()>;
}

impl<B: Backend, F: FnMut(Moment, usize, &Workspace<B>) -> Result<()>> Observer<B> for F {
    fn at(&mut self, moment: Moment, layer_idx: usize, workspace: &Workspace<B>) -> Result<()> {
        self(moment, layer_idx, workspace)
    }
}

impl<B: Backend> Attention<B> {
    /// `normed` to `q`, `k`, `v`, before `RoPE`.
    fn project(&self, backend: &B, eps: f32, ws: &mut Workspace<B>) -> Result<()> {
        let layers = [&self.q_proj, &self.k_proj, &self.v_proj];
        backend.project(&ws.normed, layers, [&mut ws.q, &mut ws.k, &mut ws.v])?;
        if let Some(weight) = &self.q_norm {
            backend.norm_heads(&mut ws.q, weight, eps)?;
        }
        if let Some(weight) = &self.k_norm {
            backend.norm_heads(&mut ws.k, weight, eps)?;
        }
        Ok(())
    }

    /// `q`, `k`, `v` to `attention`.
    fn attend(
        &self,
        backend: &B,
        rope: &RopeTable,
        batch: &Batch,
        cache: &mut B::Cache,
        ws: &mut Workspace<B>,
    ) -> Result<()> {
        backend.rope(&mut ws.q, self.shape.head_dim, rope, batch)?;
        backend.rope(&mut ws.k, self.shape.head_dim, rope, batch)?;
        backend.store(&ws.k, &ws.v, &self.shape, batch, cache)?;
        backend.attend(&ws.q, &self.shape, batch, cache, &mut ws.attention)
    }
}

impl<B: Backend> Mlp<B> {
    /// Adds its output for `normed` to `hidden`.
    fn add(&self, backend: &B, ws: &mut Workspace<B>) -> Result<()> {
        backend.gated(&ws.normed, &self.gate_proj, &self.up_proj, self.hidden_act, &mut ws.intermediate)?;
        backend.linear_add(&ws.intermediate, &self.down_proj, &mut ws.hidden)
    }
}

impl<B: Backend> Decoder<B> {
    fn eps(&self) -> f32 {
        self.config.rms_norm_eps as f32
    }

    /// Token embeddings of the batch into `hidden`.
    pub(crate) fn embed(&self, batch: &Batch, ws: &mut Workspace<B>) -> Result<()> {
        self.backend.embed(&self.embed_tokens, &batch.ids, self.embedding_scale, &mut ws.hidden)
    }

    /// Runs some layers on `hidden`. `caches`: of every layer of the model; `rope`: reaches the batch's positions.
    pub(crate) fn run(
        &self,
        layers: Range<usize>,
        batch: &Batch,
        rope: &RopeTable,
        caches: &mut [B::Cache],
        ws: &mut Workspace<B>,
        observer: &mut impl Observer<B>,
    ) -> Result<()> {
        for (layer_idx, cache) in caches.iter_mut().enumerate().take(self.layers.len()) {
            if !layers.contains(&layer_idx) {
                continue;
            }
            self.attend(layer_idx, batch, rope, cache, ws, observer)?;
            self.leave(layer_idx, ws)?;
        }
        Ok(())
    }

    /// The first half of a layer: from `hidden`, which stays as it is, to `attention`.
    pub(crate) fn attend(
        &self,
        layer_idx: usize,
        batch: &Batch,
        rope: &RopeTable,
        cache: &mut B::Cache,
        ws: &mut Workspace<B>,
        observer: &mut impl Observer<B>,
    ) -> Result<()> {
        let (block, backend, eps) = (&self.layers[layer_idx], &*self.backend, self.eps());
        observer.at(Moment::Entering, layer_idx, ws)?;
        backend.rms_norm(&ws.hidden, &block.input_layernorm, eps, &mut ws.normed)?;
        block.self_attn.project(backend, eps, ws)?;
        observer.at(Moment::Projected, layer_idx, ws)?;
        block.self_attn.attend(backend, rope, batch, cache, ws)?;
        observer.at(Moment::Attended, layer_idx, ws)
    }

    /// The second half of a layer: from `hidden` and `attention` to the `hidden` behind it.
    pub(crate) fn leave(&self, layer_idx: usize, ws: &mut Workspace<B>) -> Result<()> {
        let (block, backend) = (&self.layers[layer_idx], &*self.backend);
        backend.linear_add(&ws.attention, &block.self_attn.o_proj, &mut ws.hidden)?;
        backend.rms_norm(&ws.hidden, &block.post_attention_layernorm, self.eps(), &mut ws.normed)?;
        block.mlp.add(backend, ws)
    }

    /// Final norm of some rows of `hidden` into `normed`, where `lm_head` reads them.
    pub(crate) fn finish(&self, rows: &[usize], ws: &mut Workspace<B>) -> Result<()> {
        self.backend.gather(&ws.hidden, self.config.hidden_size, rows, &mut ws.chosen)?;
        self.backend.rms_norm(&ws.chosen, &self.norm, self.eps(), &mut ws.normed)
    }
}
