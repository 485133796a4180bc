//! The registry of merge methods.

use mqadapt_compress::METHODS;
use pyo3::prelude::*;

/// A merge method.
#[pyclass(module = "mqadapt_rs._core", frozen)]
pub(crate) struct Method(&'static mqadapt_compress::Method);

#[pymethods]
impl Method {
    #[getter]
    fn name(&self) -> &'static str {
        self.0.name
    }

    #[getter]
    fn summary(&self) -> &'static str {
        self.0.summary
    }

    /// Whether the method merges from calibration text.
    #[getter]
    fn needs_calibration(&self) -> bool {
        self.0.layer().is_some()
    }

    /// Names of the options of a calibration that the method uses.
    #[getter]
    fn options(&self) -> Vec<&'static str> {
        self.0.options().iter().map(|option| option.name()).collect()
    }

    fn __repr__(&self) -> String {
        format!("Method(name='{}')", self.0.name)
    }
}

/// The merge methods.
#[pyfunction]
pub(crate) fn methods() -> Vec<Method> {
    METHODS.iter().copied().map(Method).collect()
}
