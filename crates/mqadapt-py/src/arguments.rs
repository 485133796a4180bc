//! Arguments that several functions take.

use mqadapt_core::DType;
use mqadapt_merge::{METHODS, MergeOptions, Method};
use pyo3::prelude::*;

use crate::errors::argument;

/// Token ids: any sequence or array of whole numbers.
pub(crate) fn token_ids(ids: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let wrong = |detail: String| argument(format!("token ids are a list or an array of whole numbers: {detail}"));
    let ids: Vec<i64> = ids.extract().map_err(|e: PyErr| wrong(e.value(ids.py()).to_string()))?;
    ids.into_iter().map(|id| u32::try_from(id).map_err(|_| wrong(format!("found {id}")))).collect()
}

/// Several sequences of token ids.
pub(crate) fn sequences(sequences: &Bound<'_, PyAny>) -> PyResult<Vec<Vec<u32>>> {
    sequences.try_iter()?.map(|ids| token_ids(&ids?)).collect()
}

/// A dtype by its name.
pub(crate) fn dtype(name: Option<&str>) -> PyResult<Option<DType>> {
    let parse = |name| {
        DType::parse(name).ok_or_else(|| argument(format!("dtype '{name}' is not one of float32, float16, bfloat16")))
    };
    name.map(parse).transpose()
}

/// A merge method by its name.
pub(crate) fn method(name: &str) -> PyResult<&'static Method> {
    mqadapt_merge::method(name).ok_or_else(|| {
        let known: Vec<_> = METHODS.iter().map(|method| method.name).collect();
        argument(format!("method '{name}' is not one of {}", known.join(", ")))
    })
}

/// What a method is told about this model.
pub(crate) fn merge_options(seed: u64, config: &mqadapt_core::ModelConfig) -> MergeOptions {
    MergeOptions { seed, initializer_range: config.initializer_range }
}
