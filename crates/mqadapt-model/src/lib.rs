//! The forward pass: load a checkpoint, score, generate, and look inside.

mod aligned;
mod backend;
mod batch;
mod decoder;
mod error;
mod generate;
mod load;
mod measure;
mod model;
mod options;
mod overlay;
mod rope;
mod sample;
mod score;
mod session;
mod slots;
mod trace;

pub use error::{Error, Result};
pub use model::{HiddenStates, LayerTrace, Model};
pub use mqadapt_kernels::Precision;
pub use options::{Device, GenerateOptions, LoadOptions, Perplexity};
pub use overlay::AttentionWeights;

#[cfg(test)]
mod tests;
