//! `inspect`: what a checkpoint is, without reading its weights.

use mqadapt_checkpoint::{Checkpoint, Content, SideFile};
use mqadapt_core::{Plan, cost};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::arguments::Place;
use crate::errors::OrRaise;
use crate::source::local_path;
use crate::stream::Shards;

/// What a model is: its shape, size and K/V heads.
#[pyfunction]
pub(crate) fn inspect<'py>(py: Python<'py>, src: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyDict>> {
    let checkpoint = if let Some(checkpoint) = Shards::headers(src)? {
        checkpoint
    } else {
        let path = local_path(src, false)?;
        py.detach(|| Checkpoint::open(&path)).or_raise()?
    };
    let config = checkpoint.config();
    let keep = Plan::keep(config);
    let out = PyDict::new(py);
    out.set_item("model_type", config.family.model_type)?;
    out.set_item("num_hidden_layers", config.num_hidden_layers)?;
    out.set_item("num_attention_heads", config.num_attention_heads)?;
    out.set_item("num_key_value_heads", config.num_key_value_heads.clone())?;
    out.set_item("head_dim", config.head_dim)?;
    // of a family without a forward pass, the configuration does not tell all tensors
    let parameters = if config.family.runnable && !config.family.text_config {
        cost::parameters(config, &keep)
    } else {
        checkpoint.tensors().iter().map(|tensor| tensor.len() as u64).sum()
    };
    out.set_item("parameters", parameters)?;
    out.set_item("kv_bytes_per_token", cost::kv_bytes_per_token(config, &keep, checkpoint.dtype().bytes()))?;
    out.set_item("dtype", checkpoint.dtype().name())?;
    out.set_item("bytes", checkpoint.tensors().iter().map(|tensor| tensor.bytes).sum::<u64>())?;
    Ok(out)
}

/// The files that go along with a GGUF file's weights, made from its metadata: tokenizer, chat template and the like.
#[pyfunction]
pub(crate) fn gguf_files(py: Python<'_>, path: Place) -> PyResult<Vec<(String, Bound<'_, PyBytes>)>> {
    let files = py.detach(|| Checkpoint::open(&path)?.side_files()).or_raise()?;
    let made = |file: SideFile| match file.content {
        Content::Bytes(bytes) => Some((file.name, PyBytes::new(py, &bytes))),
        Content::File(_) => None,
    };
    Ok(files.into_iter().filter_map(made).collect())
}
