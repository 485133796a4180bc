//! Reading the source of a conversion: one shard at a time, announced to the page cache, given back when it is read.

use mqadapt_checkpoint::{Checkpoint, TensorInfo};
use mqadapt_core::DType;

use super::finite::FiniteScan;
use crate::folder::page_cache::ReadHint;
use crate::layout::steps::{Step, Work};
use crate::{Error, Result};

/// The source, and what was read of it.
pub(super) struct Reader<'a> {
    pub checkpoint: &'a Checkpoint,
    /// Who asks, for errors.
    method: &'static str,
    pub bytes_read: u64,
    /// What is copied although it is not finite.
    pub scan: FiniteScan,
    /// The source shard that is being read.
    pub reading: Option<usize>,
}

impl<'a> Reader<'a> {
    pub fn new(checkpoint: &'a Checkpoint, method: &'static str) -> Self {
        Self { checkpoint, method, bytes_read: 0, scan: FiniteScan::default(), reading: None }
    }

    /// A tensor of the source.
    pub fn source(&self, at: usize) -> Result<&'a TensorInfo> {
        let none = || Error::Method { method: self.method.to_owned(), detail: format!("no tensor {at}") };
        self.checkpoint.tensors().get(at).ok_or_else(none)
    }

    /// Some tensors of the source, one after the other.
    pub fn neighbours(&self, first: usize, count: usize) -> Result<&'a [TensorInfo]> {
        let none = || Error::Method { method: self.method.to_owned(), detail: format!("no tensor {}", first + count) };
        self.checkpoint.tensors().get(first..first + count).ok_or_else(none)
    }

    /// Values of the transpose of some tensors, one under the other, from `first_value` on; how many finite ones became infinite.
    pub fn transposed(&self, tensors: &[TensorInfo], dtype: DType, first_value: usize, out: &mut [u8]) -> Result<u64> {
        let width = dtype.bytes();
        let rows: usize = tensors.iter().filter_map(|tensor| tensor.shape.first()).sum();
        let values = first_value..first_value + out.len() / width;
        let (begin, end) = (values.start / rows.max(1), values.end.div_ceil(rows.max(1)));
        let mut run = vec![0; (end - begin) * width];
        let (mut row, mut overflowed) = (0, 0);
        for tensor in tensors {
            let &[own, columns] = tensor.shape.as_slice() else { continue };
            for nth in 0..own {
                overflowed += self.checkpoint.read_as(tensor, dtype, nth * columns + begin, &mut run)?;
                for (column, value) in (begin..end).zip(run.chunks_exact(width)) {
                    let at = (column * rows + row).checked_sub(values.start).map(|at| at * width);
                    if let Some(out) = at.and_then(|at| out.get_mut(at..at + width)) {
                        out.copy_from_slice(value);
                    }
                }
                row += 1;
            }
        }
        Ok(overflowed)
    }

    /// Says that a step's bytes of the source will be read soon.
    pub fn announce(&self, step: &Step) -> Result<Option<ReadHint>> {
        let (shard, offset, len) = match step.work {
            Work::Copy { shard, offset } => (shard, offset, step.end - step.start),
            Work::Read { tensor, first_value, dtype, .. } => {
                let source = self.source(tensor)?;
                let count = (step.end - step.start) as usize / dtype.value_bytes().unwrap_or(1);
                (source.shard, source.offset + stored(source, first_value), stored(source, count))
            }
            Work::Merge { tensor, .. } => {
                let source = self.source(tensor)?;
                (source.shard, source.offset, source.bytes)
            }
            Work::Transpose { first, count, .. } => {
                let (source, bytes) = (self.source(first)?, self.neighbours(first, count)?);
                (source.shard, source.offset, bytes.iter().map(|tensor| tensor.bytes).sum())
            }
            Work::Skip => return Ok(None),
        };
        let Some(shard) = self.checkpoint.shards().get(shard) else { return Ok(None) };
        Ok(Some(ReadHint::announce(shard.file()?, offset, offset + len)))
    }

    /// The source shard that a step reads.
    pub fn shard_of(&self, step: &Step) -> Option<usize> {
        match step.work {
            Work::Copy { shard, .. } => Some(shard),
            Work::Read { tensor, .. } | Work::Merge { tensor, .. } | Work::Transpose { first: tensor, .. } => {
                Some(self.source(tensor).ok()?.shard)
            }
            Work::Skip => self.reading,
        }
    }

    /// Gives the source shard back that the steps before were read from, if this one needs another; its sample for the
    /// fingerprint.
    pub fn read_from(&mut self, step: &Step) -> Result<Option<(usize, String)>> {
        let next = self.shard_of(step);
        if next == self.reading {
            return Ok(None);
        }
        let sample = self.done_reading()?;
        self.reading = next;
        Ok(sample)
    }

    /// Gives the source shard back that was read from; its sample for the fingerprint.
    pub fn done_reading(&mut self) -> Result<Option<(usize, String)>> {
        let Some(number) = self.reading.take() else { return Ok(None) };
        let sample = (number, self.checkpoint.sample_shard(number)?.to_owned());
        if let Some(shard) = self.checkpoint.shards().get(number) {
            shard.release();
        }
        Ok(Some(sample))
    }
}

/// Stored bytes of a number of values of a tensor.
pub(super) fn stored(tensor: &TensorInfo, values: usize) -> u64 {
    (u128::from(tensor.bytes) * values as u128 / tensor.len().max(1) as u128) as u64
}
