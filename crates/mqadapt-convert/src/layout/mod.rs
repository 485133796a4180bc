//! All of the output before the first byte is written. In: checkpoint, plan, target; out: files, tensors, and the steps that
//! make them.

mod shards;
pub(crate) mod steps;

pub(crate) use shards::{Layout, Operation, OutputShard, OutputTensor, Request};
