//! Sums over calibration text, by moment. In: projected activations of a layer; out: what methods need to know of it.

mod accumulator;
mod sums;

pub use accumulator::Accumulator;
pub use sums::{HeadMoments, LayerStatistics, Moment, NamedTensors, StatisticsShape};
