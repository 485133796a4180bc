//! What a method is that works on K/V rows. In: the rows of a group's heads; out: the rows of the one that replaces them.

use mqadapt_core::family::LayerTensor;

/// What methods can be told.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MergeOptions {
    /// Seed of methods that draw random numbers.
    pub seed: u64,
    /// Standard deviation of freshly initialised weights (`initializer_range` of `config.json`).
    pub initializer_range: f64,
}

impl Default for MergeOptions {
    fn default() -> Self {
        Self { seed: 0, initializer_range: 0.02 }
    }
}

/// Which piece of a merged tensor is asked for.
#[derive(Debug, Clone, Copy)]
pub struct RowsAt {
    /// The tensor: weight or bias of `k_proj` or `v_proj`.
    pub tensor: LayerTensor,
    /// Index of the piece's first value in the merged tensor, row-major.
    pub first_value: u64,
}

/// A method whose merged rows depend only on the same rows of the group's heads, so that tensors of any size stream.
pub trait RowMerge: Sync {
    /// Merges a piece. `heads`: for each source head of the group, in order, the values that correspond to `out`
    /// (all of one length, any number of whole rows). Accumulates in f32; the caller rounds once.
    fn merge(&self, options: &MergeOptions, at: RowsAt, heads: &[&[f32]], out: &mut [f32]);
}
