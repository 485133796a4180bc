//! Python bindings: the private module `mqadapt_rs._core`.
//!
//! In: paths, plans, token ids. Out: reports, arrays, scores. Everything above a millisecond runs on a thread of its
//! own without the GIL; every error of the crates below becomes one Python exception ([`errors`]).

mod config;
mod errors;
mod plan;
mod source;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::config::ModelConfig;
    #[pymodule_export]
    use crate::plan::Plan;

    #[pymodule_export]
    #[allow(non_upper_case_globals)] // a Python name
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
