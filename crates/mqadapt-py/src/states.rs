//! `HiddenStates` and `RequestStates`: residual streams that a model keeps and goes on from.

use pyo3::prelude::*;

/// Residual streams of some sequences at the entrance of a layer.
#[pyclass(module = "mqadapt_rs", frozen)]
pub(crate) struct HiddenStates(pub(crate) mqadapt_model::HiddenStates);

#[pymethods]
impl HiddenStates {
    /// Layers that have been run.
    #[getter]
    fn layer_idx(&self) -> usize {
        self.0.layer_idx
    }

    /// Tokens of each sequence.
    #[getter]
    fn lengths(&self) -> Vec<usize> {
        self.0.lengths.clone()
    }

    /// Memory that it takes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.0.values.len() * size_of::<f32>()
    }
}

/// Residual streams of a list of requests at the entrance of a layer.
#[pyclass(module = "mqadapt_rs", frozen)]
pub(crate) struct RequestStates(pub(crate) mqadapt_model::RequestStates);

#[pymethods]
impl RequestStates {
    /// Layers that have been run.
    #[getter]
    fn layer_idx(&self) -> usize {
        self.0.layer_idx()
    }

    /// Memory that it takes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.0.bytes()
    }
}
