//! Merging a K/V tensor that is never whole in memory. In: a way to read the source's values; out: the merged values, a
//! piece at a time. Conversion writes the pieces to a file, an overlay keeps them: both get the same bits from here.

use mqadapt_core::family::{LayerTensor, Module};
use mqadapt_core::{ModelConfig, Plan, TensorChange};

use crate::{ErrorSum, MergeOptions, RowMerge, RowsAt};

/// Values in memory at a time: the group's heads and the merged one together (2 MiB).
const VALUES_IN_MEMORY: usize = 1 << 19;
/// Pieces are cut at multiples of this, so that the sums of [`ErrorSum`] are the same however large a piece is.
const GRAIN: usize = 256;

/// The merge of one of the tensors whose rows belong to K/V heads.
pub struct KvMerge<'a> {
    /// The method.
    pub method: &'a dyn RowMerge,
    /// What the method is told.
    pub options: &'a MergeOptions,
    /// The tensor.
    pub tensor: LayerTensor,
    /// K/V heads of the source.
    pub source_heads: usize,
    /// K/V heads of the result; divides `source_heads`.
    pub heads: usize,
    /// Values of one head: `head_dim * hidden_size` of a projection, `head_dim` of a bias or norm.
    pub head_values: usize,
}

impl<'a> KvMerge<'a> {
    /// The merge that a plan asks for; `None` where the tensor stays as it is (another module, or an unchanged layer).
    #[must_use]
    pub fn of(
        tensor: LayerTensor,
        config: &ModelConfig,
        plan: &Plan,
        method: &'a dyn RowMerge,
        options: &'a MergeOptions,
    ) -> Option<Self> {
        let TensorChange::Heads { from: source_heads, to: heads } = plan.change(config, tensor) else { return None };
        let of_one = tensor.bias || tensor.module == Module::KNorm;
        let head_values = if of_one { config.head_dim } else { config.head_dim * config.hidden_size };
        Some(Self { method, options, tensor, source_heads, heads, head_values })
    }

    /// Merges piece by piece, in the order of the result. `read(first_value, out)` fills `out` with the source's values
    /// from `first_value` on; `write(first_value, merged)` takes the merged ones, and rounds them in place to what it
    /// stores, so that the error that is returned is that of the stored weights.
    ///
    /// # Errors
    /// The first error of `read` or `write`.
    pub fn run<E>(
        &self,
        mut read: impl FnMut(usize, &mut [f32]) -> Result<(), E>,
        mut write: impl FnMut(usize, &mut [f32]) -> Result<(), E>,
    ) -> Result<ErrorSum, E> {
        let group = self.source_heads / self.heads; // source heads for each target head
        let piece = (VALUES_IN_MEMORY / (group + 1) / GRAIN * GRAIN).max(GRAIN).min(self.head_values);
        let mut sources = vec![0.0; group * piece];
        let mut merged = vec![0.0; piece];
        let mut error = ErrorSum::default();
        for target in 0..self.heads {
            for first in (0..self.head_values).step_by(piece) {
                let len = piece.min(self.head_values - first);
                for (member, source) in sources.chunks_exact_mut(piece).enumerate() {
                    read((target * group + member) * self.head_values + first, &mut source[..len])?;
                }
                let heads: Vec<&[f32]> = sources.chunks_exact(piece).map(|source| &source[..len]).collect();
                let first_value = target * self.head_values + first;
                let at = RowsAt { tensor: self.tensor, first_value: first_value as u64 };
                let merged = &mut merged[..len];
                self.method.merge(self.options, at, &heads, merged);
                write(first_value, merged)?;
                error.add(&heads, merged);
            }
        }
        Ok(error)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::{METHODS, merge_tensor};

    /// Pieces smaller than a head, and a head that no piece divides: the same as merging the tensor whole.
    #[test]
    fn equals_the_whole_tensor() {
        let head_values = VALUES_IN_MEMORY + 300;
        let source: Vec<f32> = (0..4 * head_values).map(|i| ((i * 37) % 1009) as f32 / 7.0).collect();
        let options = MergeOptions { seed: 3, ..MergeOptions::default() };
        for method in METHODS {
            let Some(rows) = method.rows() else { continue };
            let tensor = LayerTensor::weight(5, Module::VProj);
            let mut whole = vec![0.0; 2 * head_values];
            merge_tensor(rows, &options, tensor, &source, 4, &mut whole);

            let merge = KvMerge { method: rows, options: &options, tensor, source_heads: 4, heads: 2, head_values };
            let mut pieces = vec![0.0; whole.len()];
            let read = |first: usize, out: &mut [f32]| {
                out.copy_from_slice(&source[first..first + out.len()]);
                Ok::<(), Infallible>(())
            };
            let write = |first: usize, merged: &mut [f32]| {
                pieces[first..first + merged.len()].copy_from_slice(merged);
                Ok(())
            };
            let Ok(error) = merge.run(read, write);
            assert_eq!(pieces, whole, "{}", method.name);
            assert!(error.relative() > 0.0);
        }
    }

    #[test]
    fn only_the_kv_tensors_of_changed_layers_merge() {
        let config = ModelConfig::from_json(
            r#"{"model_type": "qwen2", "hidden_size": 16, "intermediate_size": 8, "vocab_size": 9,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 6}"#,
        )
        .unwrap();
        let plan = Plan::parse("gqa2:1", &config).unwrap();
        let (rows, options) = (crate::method("mean").unwrap().rows().unwrap(), MergeOptions::default());
        let of = |tensor| KvMerge::of(tensor, &config, &plan, rows, &options);
        assert!(of(LayerTensor::weight(0, Module::KProj)).is_none());
        assert!(of(LayerTensor::weight(1, Module::QProj)).is_none());
        let weight = of(LayerTensor::weight(1, Module::KProj)).unwrap();
        assert_eq!((weight.source_heads, weight.heads, weight.head_values), (4, 2, 96));
        assert_eq!(of(LayerTensor::bias(1, Module::VProj)).unwrap().head_values, 6);
    }
}
