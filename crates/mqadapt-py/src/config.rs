//! `ModelConfig`.

use mqadapt_core::{DType, Plan, cost};
use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::arguments::{Text, Whole};
use crate::errors::OrRaise;
use crate::plan::LayerCache;
use crate::source::local_path;

/// What a model is: the validated content of its `config.json`.
#[pyclass(module = "mqadapt_rs", frozen, from_py_object)]
#[derive(Clone)]
pub(crate) struct ModelConfig(pub(crate) mqadapt_core::ModelConfig);

#[pymethods]
impl ModelConfig {
    /// The configuration of a model.
    #[classmethod]
    fn load(_cls: &Bound<'_, PyType>, src: &Bound<'_, PyAny>) -> PyResult<Self> {
        mqadapt_checkpoint::read_config(&local_path(src, true)?).map(Self).or_raise()
    }

    /// Reads the text of a `config.json`.
    #[classmethod]
    fn from_json(_cls: &Bound<'_, PyType>, text: Text) -> PyResult<Self> {
        mqadapt_core::ModelConfig::from_json(&text).map(Self).or_raise()
    }

    #[getter]
    fn model_type(&self) -> &'static str {
        self.0.family.model_type
    }

    #[getter]
    fn hidden_size(&self) -> usize {
        self.0.hidden_size
    }

    #[getter]
    fn intermediate_size(&self) -> usize {
        self.0.intermediate_size
    }

    #[getter]
    fn num_hidden_layers(&self) -> usize {
        self.0.num_hidden_layers
    }

    #[getter]
    fn num_attention_heads(&self) -> usize {
        self.0.num_attention_heads
    }

    #[getter]
    fn num_key_value_heads(&self) -> Vec<usize> {
        self.0.num_key_value_heads.clone()
    }

    #[getter]
    fn head_dim(&self) -> usize {
        self.0.head_dim
    }

    #[getter]
    fn vocab_size(&self) -> usize {
        self.0.vocab_size
    }

    #[getter]
    fn max_position_embeddings(&self) -> usize {
        self.0.max_position_embeddings
    }

    #[getter]
    fn tie_word_embeddings(&self) -> bool {
        self.0.tie_word_embeddings
    }

    #[getter]
    fn dtype(&self) -> Option<&'static str> {
        self.0.dtype.map(DType::name)
    }

    /// What a layer may cache under a plan, ascending by bytes; the last is its own.
    fn layer_caches(&self, layer_idx: Whole) -> PyResult<Vec<LayerCache>> {
        let keep = Plan::keep(&self.0);
        let layer_idx: usize = layer_idx.within("layer_idx", 0..=keep.layers().len().saturating_sub(1) as u64)?;
        Ok(keep.layers()[layer_idx].reductions().into_iter().map(LayerCache).collect())
    }

    /// Parameters of the model, tied embeddings counted once.
    #[getter]
    fn parameters(&self) -> u64 {
        cost::parameters(&self.0, &Plan::keep(&self.0))
    }

    fn __repr__(&self) -> String {
        format!(
            "ModelConfig(model_type='{}', num_hidden_layers={}, num_attention_heads={}, num_key_value_heads={:?}, head_dim={}, hidden_size={})",
            self.0.family.model_type,
            self.0.num_hidden_layers,
            self.0.num_attention_heads,
            self.0.num_key_value_heads,
            self.0.head_dim,
            self.0.hidden_size,
        )
    }
}
