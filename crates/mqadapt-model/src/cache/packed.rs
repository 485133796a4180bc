//! Keys and values as integers with one scale a row, in the rotated basis of `mqadapt-kernels`.

use half::f16;
use mqadapt_core::AttentionShape;
use mqadapt_kernels::{AttentionParams, Cpu, KvBits, PackedKv, PackedKvMut, Segment};

use crate::error::{Error, Result};
use crate::load::storage::Lines;
use crate::run::batch::Batch;

/// The cache of one layer.
pub(crate) struct PackedCache {
    k: Rows,
    v: Rows,
    slots: usize,
    heads: usize,
    head_dim: usize,
    bits: KvBits,
}

/// Keys or values: `[num_key_value_heads, slots, row_bytes]`, and the scales, `[num_key_value_heads, slots]`.
struct Rows {
    values: Lines,
    scales: Lines,
}

impl PackedCache {
    /// Zeros for this many tokens.
    pub(crate) fn new(shape: &AttentionShape, slots: usize, bits: KvBits) -> Result<Self> {
        let (heads, head_dim) = (shape.num_key_value_heads, shape.head_dim);
        let zeros = |bytes: usize| {
            let bytes = bytes.checked_mul(slots);
            bytes.and_then(Lines::try_zeros).ok_or(Error::Cache { tokens: slots })
        };
        let rows = || -> Result<Rows> {
            Ok(Rows { values: zeros(heads * bits.row_bytes(head_dim))?, scales: zeros(heads * size_of::<f16>())? })
        };
        Ok(Self { k: rows()?, v: rows()?, slots, heads, head_dim, bits })
    }

    /// Bytes allocated for it.
    pub(crate) fn bytes(&self) -> u64 {
        2 * (self.values() + self.scales() * size_of::<f16>()) as u64
    }

    fn values(&self) -> usize {
        self.scales() * self.bits.row_bytes(self.head_dim)
    }

    fn scales(&self) -> usize {
        self.heads * self.slots
    }

    fn view<'a>(&'a self, rows: &'a Rows) -> PackedKv<'a> {
        let (values, scales) = (rows.values.slice(self.values()), rows.scales.slice(self.scales()));
        PackedKv { values, scales, positions: self.slots, head_dim: self.head_dim, bits: self.bits }
    }

    /// Writes keys and values of all rows of a batch to their slots.
    pub(crate) fn store(&mut self, cpu: &Cpu, k: &[f32], v: &[f32], batch: &Batch) {
        let (values, scales, width) = (self.values(), self.scales(), self.heads * self.head_dim);
        let Self { slots: positions, heads, head_dim, bits, .. } = *self;
        for (new, rows) in [(k, &mut self.k), (v, &mut self.v)] {
            let (values, scales) = (rows.values.slice_mut(values), rows.scales.slice_mut(scales));
            let mut to = PackedKvMut { values, scales, positions, head_dim, bits };
            for segment in &batch.segments {
                let rows = &new[segment.row * width..(segment.row + segment.rows) * width];
                cpu.store_packed(rows, heads, &mut to, segment.slot);
            }
        }
    }

    /// Attention of every row of `segments` over what it sees; `q` and `out` are `[rows, num_attention_heads * head_dim]`.
    pub(crate) fn attend(
        &self,
        cpu: &Cpu,
        params: &AttentionParams,
        q: &[f32],
        segments: &[Segment<'_>],
        out: &mut [f32],
    ) {
        cpu.attention_packed(params, q, self.view(&self.k), self.view(&self.v), segments, out);
    }
}
