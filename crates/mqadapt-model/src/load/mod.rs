//! From a checkpoint to weights in memory: whole models, single layers, overlays.

pub(crate) mod activations;
pub(crate) mod int8;
pub(crate) mod overlay;
pub(crate) mod storage;
pub(crate) mod streamed_layer;
pub(crate) mod weights;
