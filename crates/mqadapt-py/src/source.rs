//! What takes a model takes a folder, a GGUF file or a hub id: `mqadapt_rs.sources.hub` turns all of them into a local path.

use std::path::PathBuf;

use pyo3::prelude::*;

/// The local path of a source. With `config_only`, of a source whose weights are not needed.
pub(crate) fn local_path(source: &Bound<'_, PyAny>, config_only: bool) -> PyResult<PathBuf> {
    let function = if config_only { "fetch_config" } else { "fetch" };
    source.py().import("mqadapt_rs.sources.hub")?.call_method1(function, (source,))?.extract()
}

/// What a source is called: as it was given.
pub(crate) fn name(source: &Bound<'_, PyAny>) -> PyResult<String> {
    Ok(source.str()?.to_string_lossy().into_owned())
}
