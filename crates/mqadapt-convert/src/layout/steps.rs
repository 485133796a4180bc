//! A shard as a list of steps, each ending where the next begins. In: its tensors; out: what to do, in file order.

use mqadapt_checkpoint::{Checkpoint, StoredType};
use mqadapt_core::family::LayerTensor;

use crate::layout::{Operation, OutputShard, OutputTensor};

/// Most bytes of one step that can be cut: progress is reported and an interrupt noticed between steps.
const STEP: u64 = 8 << 20;

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Step {
    /// Where it begins in the output file.
    pub start: u64,
    /// Where it ends.
    pub end: u64,
    pub work: Work,
}

/// What a step does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Work {
    /// Copy bytes of a source shard, from this offset on; the tensors they belong to do not matter.
    Copy { shard: usize, offset: u64 },
    /// Read values of a source tensor, from this one on, in another type or order; `as_stored`: in the order of its file.
    Read { tensor: usize, first_value: usize, dtype: StoredType, as_stored: bool },
    /// Read values of the transpose of some source tensors, one under the other, from this one on.
    Transpose { first: usize, count: usize, first_value: usize, dtype: StoredType },
    /// Merge the heads of a source tensor.
    Merge { tensor: usize, layer: LayerTensor, stored: StoredType },
    /// Nothing: a layer method has put the tensor there already.
    Skip,
}

/// The steps of a shard, after its header.
pub(crate) fn steps(shard: &OutputShard, checkpoint: &Checkpoint) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut copy: Option<Step> = None; // of neighbours in both files
    for tensor in &shard.tensors {
        let (start, end) = (tensor.offset, tensor.offset + tensor.bytes);
        let source = checkpoint.tensors().get(tensor.source);
        if let (Operation::Copy, Some(source)) = (tensor.operation, source) {
            let here = Work::Copy { shard: source.shard, offset: source.offset };
            match &mut copy {
                Some(run) if run.continues_to(&here) => run.end = end,
                _ => {
                    cut_copy(copy.replace(Step { start, end, work: here }).as_ref(), &mut steps);
                }
            }
            continue;
        }
        cut_copy(copy.take().as_ref(), &mut steps);
        match (tensor.operation, tensor.dtype.value_bytes()) {
            (Operation::Read, Some(width)) => {
                let (dtype, as_stored) = (tensor.dtype, tensor.stored_shape.is_some());
                let read = |first_value| Work::Read { tensor: tensor.source, first_value, dtype, as_stored };
                cut_values(tensor, width, read, &mut steps);
            }
            (Operation::Transpose { first, count, before }, Some(width)) => {
                let dtype = tensor.dtype;
                let read = |value| Work::Transpose { first, count, first_value: before + value, dtype };
                cut_values(tensor, width, read, &mut steps);
            }
            (Operation::Merge(layer), _) => {
                let stored = tensor.dtype;
                steps.push(Step { start, end, work: Work::Merge { tensor: tensor.source, layer, stored } });
            }
            _ => steps.push(Step { start, end, work: Work::Skip }),
        }
    }
    cut_copy(copy.as_ref(), &mut steps);
    steps
}

impl Step {
    /// Whether a copy goes on where this one ends.
    fn continues_to(&self, next: &Work) -> bool {
        match (&self.work, next) {
            (Work::Copy { shard, offset }, Work::Copy { shard: next_shard, offset: next_offset }) => {
                shard == next_shard && offset + (self.end - self.start) == *next_offset
            }
            _ => false,
        }
    }
}

fn cut_copy(run: Option<&Step>, steps: &mut Vec<Step>) {
    let Some(&Step { start, end, work: Work::Copy { shard, offset } }) = run else { return };
    let mut at = start;
    while at < end {
        let next = end.min(at + STEP);
        steps.push(Step { start: at, end: next, work: Work::Copy { shard, offset: offset + (at - start) } });
        at = next;
    }
}

/// Steps that read a tensor's values; `work`: from a value on.
fn cut_values(tensor: &OutputTensor, width: usize, work: impl Fn(usize) -> Work, steps: &mut Vec<Step>) {
    let end = tensor.offset + tensor.bytes;
    let mut at = tensor.offset;
    while at < end {
        let next = end.min(at + STEP); // STEP is a multiple of every size of a value, and of a quantised block
        let first_value = (at - tensor.offset) as usize / width;
        steps.push(Step { start: at, end: next, work: work(first_value) });
        at = next;
    }
}
