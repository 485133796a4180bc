//! Python bindings: the private module `mqadapt_rs._core`.
//!
//! In: paths, plans, token ids. Out: reports, arrays, scores. Everything above a millisecond runs on a thread of its
//! own without the GIL (`work`); every error of the crates below becomes one Python exception (`errors`).

// PyO3 hands arguments over by value
#![allow(clippy::needless_pass_by_value)]

mod arguments;
mod calibration;
mod config;
mod convert;
mod errors;
mod family;
mod inspect;
mod merge;
mod method;
mod model;
mod plan;
mod source;
mod states;
mod stream;
mod verify;
mod work;

use pyo3::prelude::*;

#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::calibration::Calibration;
    #[pymodule_export]
    use crate::config::LayerCache;
    #[pymodule_export]
    use crate::config::ModelConfig;
    #[pymodule_export]
    use crate::convert::{ConversionReport, convert};
    #[pymodule_export]
    use crate::family::{Family, families, register_family, registered_families};
    #[pymodule_export]
    use crate::inspect::{gguf_files, inspect};
    #[pymodule_export]
    use crate::merge::plan_merge_settings;
    #[pymodule_export]
    use crate::method::{Method, methods};
    #[pymodule_export]
    use crate::model::Model;
    #[pymodule_export]
    use crate::plan::Plan;
    #[pymodule_export]
    use crate::states::{HiddenStates, RequestStates};
    #[pymodule_export]
    use crate::verify::{Verification, verify};

    #[pymodule_export]
    #[allow(non_upper_case_globals)] // a Python name
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
