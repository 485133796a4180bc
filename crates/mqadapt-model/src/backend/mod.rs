//! The operations that the forward pass is made of, and the two that carry them out.
//!
//! [`Kernels`] runs on the processor, on buffers that are allocated once. [`Stock`] is a composition of candle's own
//! operations, so that it runs wherever candle does; on the processor the tests hold the two against each other.
//! Activations are f32, row-major, one row a token.

mod kernels;
mod stock;

use std::sync::Arc;

use mqadapt_core::{Activation, AttentionShape, CacheStorage, DType};

use crate::error::Result;
use crate::load::storage::Floats;
use crate::rope::RopeTable;
use crate::run::batch::Batch;

pub(crate) use kernels::Kernels;
pub(crate) use stock::Stock;

/// A weight matrix in main memory, `[out_features, in_features]`.
pub(crate) struct HostMatrix {
    pub values: Floats,
    pub out_features: usize,
    pub in_features: usize,
}

/// A linear layer: `y = x W^T + b`.
pub(crate) struct Linear<B: Backend> {
    /// `[out_features, in_features]`
    pub weight: Arc<B::Matrix>,
    /// `[out_features]`
    pub bias: Option<Arc<B::Vector>>,
}

/// A norm: over the root mean square, or with a bias less the mean and over the standard deviation.
pub(crate) struct Norm<B: Backend> {
    pub weight: B::Vector,
    pub bias: Option<B::Vector>,
}

/// The output projection.
pub(crate) struct Head<B: Backend> {
    /// `[vocab_size, hidden_size]`
    pub lm_head: Arc<B::Matrix>,
    /// Bound of the logits: `cap * tanh(logit / cap)`.
    pub softcap: Option<f32>,
}

impl<B: Backend> Head<B> {
    /// The same weights once more.
    pub(crate) fn shared(&self) -> Self {
        Self { lm_head: Arc::clone(&self.lm_head), softcap: self.softcap }
    }
}

/// The log-likelihood of a token is wanted: of which of the scored rows, and of which token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ScoreTarget {
    pub row: usize,
    pub token: u32,
}

/// What came out of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Scored {
    pub logprob: f64,
    /// The token is the most likely one (the first of equals).
    pub is_greedy: bool,
}

/// The operations of the forward pass. Results are written to `out`, whatever it held before.
pub(crate) trait Backend: Sized + Send + Sync + 'static {
    /// Rows of a model that are best compared at a time, see [`Self::divergences`].
    const DIVERGENCE_ROWS: usize;
    /// A weight matrix.
    type Matrix: Send + Sync;
    /// A norm's weight or a bias.
    type Vector: Send + Sync;
    /// Activations.
    type Buffer: Default + Send;
    /// Keys and values of one layer, `[num_key_value_heads, slots, head_dim]` each.
    type Cache: Send;

    fn matrix(&self, matrix: HostMatrix) -> Result<Self::Matrix>;
    /// Bytes that it takes.
    fn matrix_bytes(&self, matrix: &Self::Matrix) -> u64;
    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector>;
    /// Makes the calling thread one that may use the device.
    fn enter(&self) -> Result<()> {
        Ok(())
    }
    /// Whether caches are in main memory, not in that of a device.
    fn in_main_memory(&self) -> bool;
    /// A cache of this many slots; `dtype`: of values that are stored as computed.
    fn cache(&self, shape: &AttentionShape, storage: CacheStorage, slots: usize, dtype: DType) -> Result<Self::Cache>;
    /// Bytes allocated for it.
    fn cache_bytes(&self, cache: &Self::Cache) -> u64;
    fn upload(&self, values: &[f32], width: usize, out: &mut Self::Buffer) -> Result<()>;
    fn download(&self, buffer: &Self::Buffer) -> Result<Vec<f32>>;

    /// Rows of the embedding, times `scale`.
    fn embed(&self, table: &Self::Matrix, ids: &[u32], scale: f32, out: &mut Self::Buffer) -> Result<()>;
    fn norm(&self, x: &Self::Buffer, norm: &Norm<Self>, eps: f32, out: &mut Self::Buffer) -> Result<()>;
    /// RMS norm of every run of `weight`'s length, in place: of heads, or of rows.
    fn norm_heads(&self, x: &mut Self::Buffer, norm: &Norm<Self>, eps: f32) -> Result<()>;
    /// Three linear layers of one input.
    fn project(&self, x: &Self::Buffer, layers: [&Linear<Self>; 3], outs: [&mut Self::Buffer; 3]) -> Result<()>;
    /// `x W^T + b`
    fn linear(&self, x: &Self::Buffer, linear: &Linear<Self>, out: &mut Self::Buffer) -> Result<()>;
    /// `out += factor * x`
    fn add(&self, x: &Self::Buffer, factor: f32, out: &mut Self::Buffer) -> Result<()>;
    fn copy(&self, x: &Self::Buffer, out: &mut Self::Buffer) -> Result<()>;
    /// `residual += x W^T + b`
    fn linear_add(&self, x: &Self::Buffer, linear: &Linear<Self>, residual: &mut Self::Buffer) -> Result<()>;
    /// `act(gate x) * (up x)`
    fn gated(
        &self,
        x: &Self::Buffer,
        gate: &Linear<Self>,
        up: &Linear<Self>,
        act: Activation,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `act(up x)`
    fn activated(&self, x: &Self::Buffer, up: &Linear<Self>, act: Activation, out: &mut Self::Buffer) -> Result<()>;
    /// `out += ` rows of the table of positions.
    fn add_positions(&self, table: &Self::Matrix, positions: &[u32], out: &mut Self::Buffer) -> Result<()>;
    /// Rotates the heads of every row to its position, in place.
    fn rope(&self, x: &mut Self::Buffer, head_dim: usize, rope: &RopeTable, batch: &Batch) -> Result<()>;
    /// Writes keys and values of all rows to their slots.
    fn store(
        &self,
        k: &Self::Buffer,
        v: &Self::Buffer,
        shape: &AttentionShape,
        batch: &Batch,
        cache: &mut Self::Cache,
    ) -> Result<()>;
    /// Attention of every row over its piece's spans, up to its own position; `[rows, num_attention_heads * head_dim]`.
    fn attend(
        &self,
        q: &Self::Buffer,
        shape: &AttentionShape,
        batch: &Batch,
        cache: &Self::Cache,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// Some rows of `[_, width]`, in the order given.
    fn gather(&self, x: &Self::Buffer, width: usize, rows: &[usize], out: &mut Self::Buffer) -> Result<()>;
    /// Logits of all rows, `[rows, vocab_size]`.
    fn logits(&self, x: &Self::Buffer, head: &Head<Self>, out: &mut Vec<f32>) -> Result<()>;
    /// Log-likelihoods; `wanted` ascends by row.
    fn score(&self, x: &Self::Buffer, head: &Head<Self>, wanted: &[ScoreTarget], out: &mut Vec<Scored>) -> Result<()>;
    /// `KL(reference | other)` of every row of every other model, in nats, `[others, rows]`. `x` (behind the final norm):
    /// `rows` rows of the reference, then as many of each other model.
    fn divergences(&self, x: &Self::Buffer, head: &Head<Self>, rows: usize, out: &mut Vec<f64>) -> Result<()>;
    /// The most likely token of every row (the first of equals).
    fn argmax(&self, x: &Self::Buffer, head: &Head<Self>, out: &mut Vec<u32>) -> Result<()>;
}
