//! Attention of the stock path. In: queries of a batch and the caches that it reads; out: what `o_proj` reads. Masks are made on
//! the device, and rotary tables are held there: sending them once a layer takes longer than using them.

use std::sync::PoisonError;

use candle_core::{DType as CandleDType, Tensor};
use candle_nn::ops::softmax_last_dim;
use mqadapt_core::AttentionShape;
use mqadapt_kernels::Span;

use super::{Stock, StockCache};
use crate::error::Result;
use crate::run::batch::{Batch, Segment};

/// Added to the logits of keys that a query does not see: its exponential is 0 beside any other.
const UNSEEN: f64 = -1e30;
/// Tables of one pass: cosines and sines, of full and of windowed layers.
const ROTARY_TABLES: usize = 4;
/// Query rows of a piece whose logits are held at a time in main memory.
const ROWS: usize = 128;
/// Logits that are held at a time in a GPU's memory, where many small steps take longer.
const GPU_LOGITS: usize = 64 << 20;

impl Stock {
    /// Attention of all pieces of a batch, `[rows, num_attention_heads * head_dim]`.
    pub(super) fn attention(
        &self,
        q: &Tensor,
        shape: &AttentionShape,
        batch: &Batch,
        cache: &StockCache,
    ) -> Result<Tensor> {
        let mut parts = Vec::new();
        for segment in &batch.segments {
            let k = cached(&cache.k, batch, segment)?;
            let v = cached(&cache.v, batch, segment)?;
            let tokens = k.dim(1)?;
            let fitting = (GPU_LOGITS / (shape.num_attention_heads * tokens)).max(ROWS);
            let at_once = if self.device.is_cpu() { ROWS } else { fitting };
            for first in (0..segment.rows).step_by(at_once) {
                let count = at_once.min(segment.rows - first);
                let rows = q.narrow(0, segment.row + first, count)?;
                // no row sees what is behind the last
                let seen = tokens - (segment.rows - first - count);
                let (k, v) = (k.narrow(1, 0, seen)?, v.narrow(1, 0, seen)?);
                parts.push(self.attend_rows(&rows, &k, &v, shape, segment.position + first)?);
            }
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// Attention of some rows of a piece. `q`: `[rows, num_attention_heads * head_dim]`, `k`, `v`:
    /// `[num_key_value_heads, tokens, head_dim]`; `position`: that of the first row.
    fn attend_rows(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: &AttentionShape,
        position: usize,
    ) -> Result<Tensor> {
        let (rows, d) = (q.dim(0)?, shape.head_dim);
        let (kv, groups) = (shape.num_key_value_heads, shape.num_attention_heads / shape.num_key_value_heads);
        let tokens = k.dim(1)?;
        // [num_key_value_heads, groups * rows, head_dim]: the query heads of a K/V head are its rows
        let q = q.reshape((rows, kv, groups, d))?.permute((1, 2, 0, 3))?.contiguous()?;
        let q = (q.reshape((kv, groups * rows, d))? * shape.scaling)?;
        let mut logits = q.matmul(&k.t()?)?;
        if let Some(cap) = shape.attn_logit_softcapping {
            logits = ((logits / cap)?.tanh()? * cap)?;
        }
        if let Some(mask) = self.mask(rows, tokens, position, shape.sliding_window)? {
            logits = logits.reshape((kv, groups, rows, tokens))?.broadcast_add(&mask)?;
        }
        let weights = softmax_last_dim(&logits.reshape((kv, groups * rows, tokens))?)?;
        let out = weights.matmul(v)?.reshape((kv, groups, rows, d))?.permute((2, 0, 1, 3))?.contiguous()?;
        Ok(out.reshape((rows, shape.num_attention_heads * d))?)
    }

    /// What is added to logits, `[rows, tokens]`; none where the rows from `position` on see all tokens.
    fn mask(&self, rows: usize, tokens: usize, position: usize, window: Option<usize>) -> Result<Option<Tensor>> {
        let last = position + rows - 1;
        if tokens <= position + 1 && window.is_none_or(|window| last < window) {
            return Ok(None);
        }
        // how far a token is behind a row's own
        let (of_rows, of_tokens) = (self.indices(position, rows)?, self.indices(0, tokens)?);
        let behind = of_rows.reshape((rows, 1))?.broadcast_sub(&of_tokens.reshape((1, tokens))?)?;
        let mut unseen = behind.lt(0.0)?.to_dtype(CandleDType::F32)?;
        if let Some(window) = window {
            unseen = (unseen + behind.ge(window as f64)?.to_dtype(CandleDType::F32)?)?;
        }
        Ok(Some((unseen * UNSEEN)?))
    }

    /// `first, first + 1, ..`, f32.
    fn indices(&self, first: usize, count: usize) -> Result<Tensor> {
        let mut held = self.indices.lock().unwrap_or_else(PoisonError::into_inner);
        let all = match held.take() {
            Some(all) if all.elem_count() >= first + count => all,
            _ => {
                let all = (first + count).next_multiple_of(1024);
                Tensor::from_vec((0..all).map(|i| i as f32).collect(), all, &self.device)?
            }
        };
        Ok(held.insert(all).narrow(0, first, count)?)
    }

    /// The rows of a rotary table at the batch's positions, `[rows, pairs]`.
    pub(super) fn rotary(&self, values: &[f32], pairs: usize, batch: &Batch) -> Result<Tensor> {
        let row = |at: &u32| values[*at as usize * pairs..][..pairs].iter().copied();
        let rows: Vec<f32> = batch.positions.iter().flat_map(row).collect();
        let mut held = self.rotary.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, on_device)) = held.iter().find(|(known, _)| *known == rows) {
            return Ok(on_device.clone());
        }
        let on_device = Tensor::from_slice(&rows, (batch.positions.len(), pairs), &self.device)?;
        if held.len() == ROTARY_TABLES {
            held.remove(0);
        }
        held.push((rows, on_device.clone()));
        Ok(on_device)
    }
}

/// Keys or values of a piece and of what it reads, `[num_key_value_heads, tokens, head_dim]`, f32.
fn cached(cache: &Tensor, batch: &Batch, segment: &Segment) -> Result<Tensor> {
    let own = Span { start: segment.slot, len: segment.rows };
    let spans = batch.prefix(segment).iter().chain([&own]);
    let parts: candle_core::Result<Vec<_>> = spans.map(|span| cache.narrow(1, span.start, span.len)).collect();
    Ok(Tensor::cat(&parts?, 1)?.to_dtype(CandleDType::F32)?.contiguous()?)
}
