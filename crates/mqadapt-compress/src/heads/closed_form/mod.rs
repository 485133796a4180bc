//! The closed form: K/V heads merged by a second-order solution from activation
//! statistics, `q_proj` and `o_proj` compensated. Data in: a layer's weights and
//! [`crate::LayerStatistics`]. Data out: weights of fewer K/V heads and a report.
//!
//! `docs/merge-methods.md` derives the formulas.

mod assembly;
mod cut;
mod group;
mod grouping;
mod joint;
mod keys;
mod lbfgs;
mod measure;
mod merge;
mod method;
mod normed;
mod pairs;
mod predict;
mod predicted;
mod prior;
mod readout;
mod report;
mod slow;
#[cfg(test)]
pub(crate) mod tests;
mod values;

pub use cut::Cut;
pub use measure::Measurement;
#[cfg(test)]
pub(crate) use measure::{features, outputs};
pub use merge::{ClosedFormOptions, merge};
pub(crate) use method::ClosedForm;
pub use predicted::{FixedMerge, predicted_error};
pub use report::{Fallback, LayerReport, Solution};
