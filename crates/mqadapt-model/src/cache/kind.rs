//! The kinds of cache that the kernels read, by their storage.

use mqadapt_core::{AttentionShape, CacheStorage, DType};
use mqadapt_kernels::{AttentionParams, Cpu, KvBits, Segment};

use super::{FloatCache, PackedCache};
use crate::error::Result;
use crate::run::batch::Batch;

/// The cache of one layer.
pub(crate) enum KernelCache {
    Float(FloatCache),
    Packed(PackedCache),
}

impl KernelCache {
    /// Zeros for this many tokens; `dtype`: of values that are stored as computed.
    pub(crate) fn new(shape: &AttentionShape, storage: CacheStorage, slots: usize, dtype: DType) -> Result<Self> {
        let packed = |bits| Ok(Self::Packed(PackedCache::new(shape, slots, bits)?));
        match storage {
            CacheStorage::Int8 => packed(KvBits::Eight),
            CacheStorage::Int4 => packed(KvBits::Four),
            _ => Ok(Self::Float(FloatCache::new(shape, slots, dtype)?)),
        }
    }

    /// Bytes allocated for it.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::Float(cache) => cache.bytes(),
            Self::Packed(cache) => cache.bytes(),
        }
    }

    /// Writes keys and values of all rows of a batch to their slots.
    pub(crate) fn store(&mut self, cpu: &Cpu, k: &[f32], v: &[f32], shape: &AttentionShape, batch: &Batch) {
        match self {
            Self::Float(cache) => cache.store(cpu, k, v, shape, batch),
            Self::Packed(cache) => cache.store(cpu, k, v, batch),
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
        match self {
            Self::Float(cache) => cache.attend(cpu, params, q, head_dim, segments, out),
            Self::Packed(cache) => cache.attend(cpu, params, q, segments, out),
        }
    }
}
