//! Merging from calibration text: statistics of each layer, its merge, and the refit on the converted stream.
//!
//! In: a checkpoint, token sequences or saved statistics, and a layer's weights. Out: the merged weights and what they
//! cost. Layers are taken in order; besides the residual streams only one layer is in memory.

mod collect;
mod layers;
mod overlay;
mod refine;
mod refit;
mod text;
mod weights;

pub(crate) use collect::{Collector, block_heads};
pub use layers::{CalibratedLayer, CalibratedMerge, CalibratedMethod};
pub use text::{Calibration, LayerSample};
pub use weights::{attention_weights, layer_geometry, layer_weights};
