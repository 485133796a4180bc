//! `verify`.

use mqadapt_checkpoint::Checkpoint;
use pyo3::prelude::*;

use crate::arguments::Place;
use crate::errors::OrRaise;
use crate::source::local_path;
use crate::work;

/// What a verification found.
#[pyclass(module = "mqadapt_rs", frozen, get_all)]
pub(crate) struct Verification {
    problems: Vec<String>,
    shards: usize,
    tensors: usize,
    bytes: u64,
    compared: usize,
    not_compared: usize,
}

#[pymethods]
impl Verification {
    /// Whether nothing is wrong.
    #[getter]
    fn ok(&self) -> bool {
        self.problems.is_empty()
    }

    fn __repr__(&self) -> String {
        format!("Verification(problems={:?}, tensors={}, compared={})", self.problems, self.tensors, self.compared)
    }
}

/// Whether a converted checkpoint is what its manifest says.
#[pyfunction]
#[pyo3(signature = (dst, against = None, *, progress = None))]
pub(crate) fn verify(
    py: Python<'_>,
    dst: Place,
    against: Option<&Bound<'_, PyAny>>,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<Verification> {
    let path = against.map(|source| local_path(source, false)).transpose()?;
    let source = py.detach(|| path.map(|path| Checkpoint::open(&path)).transpose()).or_raise()?;
    let found = work::run(py, progress, |progress| mqadapt_convert::verify(&dst, source.as_ref(), progress))?;
    let mqadapt_convert::Verification { problems, shards, tensors, bytes, compared, not_compared } = found;
    Ok(Verification { problems, shards, tensors, bytes, compared, not_compared })
}
