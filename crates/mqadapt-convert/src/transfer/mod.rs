//! Moving the bytes. In: a layout and what an earlier run has left; out: files, their checksums, and what was learnt on the way.
//!
//! This thread reads, computes and hashes; the [`Writer`]'s writes; the flusher's brings it to the disk.

mod finite;
mod flusher;
mod layers;
mod reader;
mod report;
mod tensors;
mod writer;

pub(crate) use layers::LayerNotes;
pub(crate) use report::PHASE;
pub(crate) use tensors::{Moved, Transfer};
pub(crate) use writer::Writer;
