//! Merging the K/V heads of one attention layer: pure mathematics, no I/O.
//!
//! In: the rows of `k_proj` and `v_proj` that belong to the heads of a group. Out: the rows of the one head that
//! replaces them. Groups are contiguous, as in transformers' `repeat_kv`: of `G` source heads and `G'` target heads,
//! target head `t` replaces the source heads `t * G / G'` to `(t + 1) * G / G' - 1`.
//!
//! ```
//! use mqadapt_compress::{MergeOptions, RowMerge, method, merge_tensor};
//! use mqadapt_core::family::{LayerTensor, Module};
//!
//! let mean = method("mean").unwrap();
//! // two heads of two rows, three columns each
//! let k_proj = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 5.0, 5.0, 5.0];
//! let mut merged = [0.0; 6];
//! let tensor = LayerTensor::weight(0, Module::KProj);
//! merge_tensor(mean.rows().unwrap(), &MergeOptions::default(), tensor, &k_proj, 2, &mut merged);
//! assert_eq!(merged, [1.0, 1.0, 1.0, 3.0, 3.0, 3.0]);
//! ```

mod algebra;
mod attention;
mod error;
mod heads;
mod layer;
mod layer_merge;
mod layer_method;
mod method;
mod qk_norm;
mod refine;
mod refit;
mod statistics;

pub use error::Error;
pub use heads::closed_form;
pub use heads::error_sum::ErrorSum;
pub use heads::piecewise::KvMerge;
pub use heads::prune::prune;
pub use heads::row_merge::{MergeOptions, RowMerge, RowsAt};
pub use layer::LayerWeights;
pub use layer_merge::{LayerJob, LayerMerge, LayerOptions, MethodOption, Needs};
pub use layer_method::{LayerError, LayerMethod, MergedLayer};
pub use method::{METHODS, Method, MethodKind, Prediction, merge_tensor, method};
pub use qk_norm::QkNorm;
pub use refine::{RefineOptions, Target, refine};
pub use refit::{REFIT_LAMBDA, Refit, Refitted};
pub use statistics::{Accumulator, HeadMoments, LayerStatistics, Moment, NamedTensors, StatisticsShape};
