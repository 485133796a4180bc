//! `ModelConfig`, and `LayerCache`: what its layers may cache.

use mqadapt_core::{CacheStorage, DType, Plan, cost};
use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::arguments::{Text, Whole};
use crate::errors::{OrRaise, argument};
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

/// A `ModelConfig` as it is, or that of anything that names a model.
pub(crate) fn model_config(config: &Bound<'_, PyAny>) -> PyResult<ModelConfig> {
    if let Ok(config) = config.extract::<ModelConfig>() {
        return Ok(config);
    }
    config.py().get_type::<ModelConfig>().call_method1("load", (config,))?.extract().map_err(Into::into)
}

/// A way to store a cache, by its name.
pub(crate) fn parse_storage(name: &str, text: &str) -> PyResult<CacheStorage> {
    let known = CacheStorage::ALL.map(CacheStorage::name).join(", ");
    CacheStorage::parse(text).ok_or_else(|| argument(format!("{name} '{text}' is not one of {known}")))
}

/// What a layer caches of every token.
#[pyclass(module = "mqadapt_rs._core", frozen, eq, hash, from_py_object)]
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct LayerCache(pub(crate) mqadapt_core::LayerCache);

#[pymethods]
#[allow(clippy::trivially_copy_pass_by_ref)] // PyO3 lends what it holds
impl LayerCache {
    /// K/V heads, and how they are stored.
    #[new]
    #[pyo3(
        signature = (num_key_value_heads, storage = Text::from("computed")),
        text_signature = "(num_key_value_heads, storage='computed')"
    )]
    fn new(num_key_value_heads: Whole, storage: Text) -> PyResult<Self> {
        let heads = num_key_value_heads.positive("num_key_value_heads")?;
        Ok(Self(mqadapt_core::LayerCache::heads(heads).stored(parse_storage("storage", &storage)?)))
    }

    /// How it is stored: `computed`, `int8`, `int4`.
    #[getter]
    fn storage(&self) -> &'static str {
        self.0.storage.name()
    }

    #[getter]
    fn num_key_value_heads(&self) -> usize {
        self.0.num_key_value_heads()
    }

    /// What a layer that caches this may be reduced to, ascending by bytes; the last is this.
    fn reductions(&self) -> Vec<Self> {
        self.0.reductions().into_iter().map(Self).collect()
    }

    /// Bytes that one token adds to the cache of a layer, with `value_bytes` bytes a computed value.
    #[pyo3(signature = (config, value_bytes = Whole::from(2)), text_signature = "($self, config, value_bytes=2)")]
    fn bytes_per_token(&self, config: &Bound<'_, PyAny>, value_bytes: Whole) -> PyResult<u64> {
        let value_bytes = value_bytes.within("value_bytes", 1..=64)?;
        Ok(self.0.bytes_per_token(model_config(config)?.0.head_dim, value_bytes))
    }

    fn __reduce__<'py>(&self, py: Python<'py>) -> (Bound<'py, PyType>, (usize, &'static str)) {
        (py.get_type::<Self>(), (self.num_key_value_heads(), self.storage()))
    }

    fn __str__(&self) -> String {
        self.0.to_string()
    }

    fn __repr__(&self) -> String {
        match self.0.storage {
            CacheStorage::AsComputed => format!("LayerCache(num_key_value_heads={})", self.num_key_value_heads()),
            storage => {
                format!("LayerCache(num_key_value_heads={}, storage='{}')", self.num_key_value_heads(), storage.name())
            }
        }
    }
}
