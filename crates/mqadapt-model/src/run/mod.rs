//! What a loaded model does: passes over batches of rows, scores, continuations, traces.

pub(crate) mod batch;
pub(crate) mod divergence;
pub(crate) mod generate;
pub(crate) mod hidden_states;
pub(crate) mod measure;
pub(crate) mod sample;
pub(crate) mod score;
pub(crate) mod session;
pub(crate) mod trace;
