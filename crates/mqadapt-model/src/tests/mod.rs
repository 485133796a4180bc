//! Tests of the whole model on tiny random checkpoints of every family. Parity with transformers is tested from Python.

mod fixtures;
mod generation;
mod inside;
mod long_context;
mod overlays;
mod parity;
mod scoring;
mod variants;

use crate::{LoadOptions, Model};
