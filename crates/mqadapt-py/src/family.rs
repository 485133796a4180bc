//! The registry of model families.

use mqadapt_core::FAMILIES;
use mqadapt_core::family;
use pyo3::prelude::*;

use crate::arguments::Text;
use crate::errors::OrRaise;

/// A model family.
#[pyclass(module = "mqadapt_rs._core", frozen)]
pub(crate) struct Family(&'static mqadapt_core::Family);

#[pymethods]
impl Family {
    /// `model_type` of its `config.json`.
    #[getter]
    fn model_type(&self) -> &'static str {
        self.0.model_type
    }

    /// Whether there is a forward pass for it.
    #[getter]
    fn runnable(&self) -> bool {
        self.0.runnable
    }

    /// The targets that a conversion can be written for.
    #[staticmethod]
    fn targets() -> Vec<&'static str> {
        mqadapt_convert::TARGETS.iter().map(|target| target.name()).collect()
    }

    /// Whether layers of one model may have different numbers of K/V heads.
    #[getter]
    fn layers_may_differ(&self) -> bool {
        !self.0.text_config
    }

    /// Whether GGUF files of it are read.
    #[getter]
    fn gguf(&self) -> bool {
        mqadapt_checkpoint::gguf_model_types().any(|model_type| model_type == self.0.model_type)
    }

    fn __repr__(&self) -> String {
        format!("Family(model_type='{}')", self.0.model_type)
    }
}

/// The model families.
#[pyfunction]
pub(crate) fn families() -> Vec<Family> {
    FAMILIES.iter().copied().map(Family).collect()
}

/// Reads checkpoints of a `model_type` that is not known (`None`: of any such) as those of a family.
#[pyfunction]
pub(crate) fn register_family(model_type: Option<Text>, family: Text) -> PyResult<()> {
    family::register(model_type.as_deref(), &family).or_raise()
}

/// What was registered, for the processes that a search starts.
#[pyfunction]
pub(crate) fn registered_families() -> Vec<(Option<String>, &'static str)> {
    family::registered()
}
