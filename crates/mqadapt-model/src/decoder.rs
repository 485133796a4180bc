//! The decoder, written once for every family and every [`Backend`]. In: the rows of a [`Batch`]; out: their residual
//! stream. Its modules carry the names of the checkpoint.

use std::ops::Range;
use std::sync::Arc;

use mqadapt_core::ModelConfig;

use crate::backend::{Backend, Head, Norm};
use crate::block::Block;
use crate::error::Result;
use crate::rope::RopeTables;
use crate::run::batch::Batch;
use crate::workspace::Workspace;

/// The model without what surrounds it: embedding, layers, final norm, output projection.
pub(crate) struct Decoder<B: Backend> {
    pub backend: Arc<B>,
    pub config: ModelConfig,
    /// Factor on the embeddings, rounded as the family rounds it; 1 for most.
    pub embedding_scale: f32,
    pub embed_tokens: Arc<B::Matrix>,
    /// Added to the token embeddings, where positions are learned.
    pub embed_positions: Option<Arc<B::Matrix>>,
    pub layers: Vec<Arc<Block<B>>>,
    /// The final norm; its weight and bias divided by the factor by which logits are scaled down.
    pub norm: Arc<Norm<B>>,
    pub head: Head<B>,
}

/// Where a pass is when its observer is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Before a layer: `hidden` is what enters it.
    Entering,
    /// Within a layer: `normed`, `q`, `k`, `v` are there, and nothing has been rotated.
    Projected,
    /// Within a layer: `attention` is there.
    Attended,
}

/// Watches a pass, and may end it by an error.
pub(crate) trait Observer<B: Backend> {
    fn at(&mut self, moment: Stage, layer_idx: usize, workspace: &Workspace<B>) -> Result<()>;
}

impl<B: Backend, F: FnMut(Stage, usize, &Workspace<B>) -> Result<()>> Observer<B> for F {
    fn at(&mut self, moment: Stage, layer_idx: usize, workspace: &Workspace<B>) -> Result<()> {
        self(moment, layer_idx, workspace)
    }
}

impl<B: Backend> Decoder<B> {
    /// Token embeddings of the batch into `hidden`.
    pub(crate) fn embed(&self, batch: &Batch, ws: &mut Workspace<B>) -> Result<()> {
        self.backend.embed(&self.embed_tokens, &batch.ids, self.embedding_scale, &mut ws.hidden)?;
        match &self.embed_positions {
            Some(table) => self.backend.add_positions(table, &batch.positions, &mut ws.hidden),
            None => Ok(()),
        }
    }

    /// Runs some layers on `hidden`. `caches`: of every layer of the model; `ropes`: reach the batch's positions.
    pub(crate) fn run(
        &self,
        layers: Range<usize>,
        batch: &Batch,
        ropes: &RopeTables,
        caches: &mut [B::Cache],
        ws: &mut Workspace<B>,
        observer: &mut impl Observer<B>,
    ) -> Result<()> {
        for (layer_idx, cache) in caches.iter_mut().enumerate().take(self.layers.len()) {
            if !layers.contains(&layer_idx) {
                continue;
            }
            self.attend(layer_idx, batch, ropes, cache, ws, observer)?;
            self.leave(layer_idx, ws)?;
        }
        Ok(())
    }

    /// The first half of a layer: from `hidden`, which stays as it is, to `attention`.
    pub(crate) fn attend(
        &self,
        layer_idx: usize,
        batch: &Batch,
        ropes: &RopeTables,
        cache: &mut B::Cache,
        ws: &mut Workspace<B>,
        observer: &mut impl Observer<B>,
    ) -> Result<()> {
        let (block, backend) = (&self.layers[layer_idx], &*self.backend);
        observer.at(Stage::Entering, layer_idx, ws)?;
        block.enter(backend, ws)?;
        block.self_attn.project(backend, block.eps, ws)?;
        observer.at(Stage::Projected, layer_idx, ws)?;
        block.self_attn.attend(backend, ropes.of_layer(layer_idx), batch, cache, ws)?;
        observer.at(Stage::Attended, layer_idx, ws)
    }

    /// The second half of a layer: from `hidden` and `attention` to the `hidden` behind it.
    pub(crate) fn leave(&self, layer_idx: usize, ws: &mut Workspace<B>) -> Result<()> {
        self.layers[layer_idx].leave(&self.backend, ws)
    }

    /// Final norm of some rows of `hidden` into `normed`, where `lm_head` reads them.
    pub(crate) fn finish(&self, rows: &[usize], ws: &mut Workspace<B>) -> Result<()> {
        self.backend.gather(&ws.hidden, self.config.hidden_size, rows, &mut ws.chosen)?;
        self.backend.norm(&ws.chosen, &self.norm, self.config.rms_norm_eps as f32, &mut ws.normed)
    }
}
