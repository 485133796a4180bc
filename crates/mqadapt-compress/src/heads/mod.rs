//! Methods that give a layer fewer K/V heads.

pub mod closed_form;
pub(crate) mod error_sum;
pub(crate) mod first;
pub(crate) mod mean;
pub(crate) mod piecewise;
pub(crate) mod prune;
pub(crate) mod random;
pub(crate) mod row_merge;
