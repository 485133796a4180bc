//! Keys and values as floats of one dtype, as the model computes them.

use mqadapt_core::{AttentionShape, DType};
use mqadapt_kernels::{AttentionParams, Cpu, KvMut, KvRef, Segment};

use crate::error::{Error, Result};
use crate::load::storage::Floats;
use crate::run::batch::Batch;

/// The cache of one layer, `[num_key_value_heads, slots, head_dim]` each.
pub(crate) struct FloatCache {
    k: Floats,
    v: Floats,
    slots: usize,
}

impl FloatCache {
    /// Zeros for this many tokens.
    pub(crate) fn new(shape: &AttentionShape, slots: usize, dtype: DType) -> Result<Self> {
        let len = (shape.num_key_value_heads * shape.head_dim).saturating_mul(slots);
        let zeros = || Floats::try_zeros(len, dtype).ok_or(Error::Cache { tokens: slots });
        Ok(Self { k: zeros()?, v: zeros()?, slots })
    }

    /// Bytes allocated for it.
    pub(crate) fn bytes(&self) -> u64 {
        (self.k.bytes() + self.v.bytes()) as u64
    }

    /// Writes keys and values of all rows of a batch to their slots.
    pub(crate) fn store(&mut self, cpu: &Cpu, k: &[f32], v: &[f32], shape: &AttentionShape, batch: &Batch) {
        let (kv, head_dim) = (shape.num_key_value_heads, shape.head_dim);
        let width = kv * head_dim;
        for (new, stored) in [(k, &mut self.k), (v, &mut self.v)] {
            let data = stored.as_mut();
            let mut to = KvMut { data, head_stride: self.slots * head_dim, row_stride: head_dim, head_dim };
            for segment in &batch.segments {
                let rows = &new[segment.row * width..(segment.row + segment.rows) * width];
                cpu.store_kv(rows, kv, &mut to, segment.slot);
            }
        }
    }

    /// Attention of every row of `segments` over what it sees; `q` and `out` are `[rows, num_attention_heads * head_dim]`.
    pub(crate) fn attend(
        &self,
        cpu: &Cpu,
        params: &AttentionParams,
        q: &[f32],
        head_dim: usize,
        segments: &[Segment<'_>],
        out: &mut [f32],
    ) {
        let view = |floats| KvRef { data: floats, head_stride: self.slots * head_dim, row_stride: head_dim, head_dim };
        cpu.attention(params, q, view(self.k.as_ref()), view(self.v.as_ref()), segments, out);
    }
}
