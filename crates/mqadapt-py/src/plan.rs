//! `Plan`.

use mqadapt_core::{CacheStorage, cost};
use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::arguments::{Text, Whole, counts};
use crate::config::{LayerCache, ModelConfig, model_config, parse_storage};
use crate::errors::{OrRaise, argument};

/// What each layer of a model caches.
#[pyclass(module = "mqadapt_rs", frozen, eq, hash, from_py_object)]
#[derive(Clone, PartialEq, Eq, Hash)]
pub(crate) struct Plan(pub(crate) mqadapt_core::Plan);

#[pymethods]
impl Plan {
    /// Reads a plan for a model: its text, or the name of a .json or .yaml file.
    #[classmethod]
    fn parse(_cls: &Bound<'_, PyType>, text: &Bound<'_, PyAny>, config: &Bound<'_, PyAny>) -> PyResult<Self> {
        let config = model_config(config)?;
        read(text, &config.0).map(Self)
    }

    /// The plan under which the layers of a model cache this.
    #[classmethod]
    fn from_layers(_cls: &Bound<'_, PyType>, layers: Vec<LayerCache>, config: &Bound<'_, PyAny>) -> PyResult<Self> {
        let layers: Vec<_> = layers.into_iter().map(|cache| cache.0).collect();
        let source: Vec<_> = match config.extract::<Vec<LayerCache>>() {
            Ok(source) => source.into_iter().map(|cache| cache.0).collect(),
            Err(_) => mqadapt_core::Plan::keep(&model_config(config)?.0).layers().to_vec(),
        };
        mqadapt_core::Plan::from_layers(&layers, &source).map(Self).or_raise()
    }

    /// What each layer caches.
    #[getter]
    fn layers(&self) -> Vec<LayerCache> {
        self.0.layers().iter().copied().map(LayerCache).collect()
    }

    /// The text of the plan, which `parse` reads back.
    fn describe(&self) -> String {
        self.0.describe()
    }

    /// K/V heads of each layer.
    #[getter]
    fn num_key_value_heads(&self) -> Vec<usize> {
        self.0.num_key_value_heads()
    }

    /// How the K/V cache of each layer is stored.
    #[getter]
    fn storage(&self) -> Vec<&'static str> {
        self.0.storage().into_iter().map(CacheStorage::name).collect()
    }

    /// The same plan with the K/V cache of all layers stored so.
    fn stored(&self, storage: Text) -> PyResult<Self> {
        self.0.stored(parse_storage("storage", &storage)?).map(Self).or_raise()
    }

    /// K/V heads of each layer of the model that the plan was built for.
    #[getter]
    fn source_num_key_value_heads(&self) -> Vec<usize> {
        self.0.source_num_key_value_heads().to_vec()
    }

    /// The layers that the plan changes, ascending.
    #[getter]
    fn changed_layers(&self) -> Vec<usize> {
        self.0.changed_layers()
    }

    /// Bytes that one token adds to the K/V cache over all layers, with `value_bytes` bytes a value.
    #[pyo3(signature = (config, value_bytes = Whole::from(2)), text_signature = "($self, config, value_bytes=2)")]
    fn kv_bytes_per_token(&self, config: &Bound<'_, PyAny>, value_bytes: Whole) -> PyResult<u64> {
        let value_bytes = value_bytes.within("value_bytes", 1..=64)?;
        Ok(cost::kv_bytes_per_token(&self.fitting(config)?.0, &self.0, value_bytes))
    }

    /// Parameters of the model under the plan.
    fn parameters(&self, config: &Bound<'_, PyAny>) -> PyResult<u64> {
        Ok(cost::parameters(&self.fitting(config)?.0, &self.0))
    }

    /// The content of a plan file.
    fn __str__(&self) -> String {
        self.0.to_string()
    }

    fn __repr__(&self) -> String {
        let heads = self.0.num_key_value_heads();
        if self.0.stored_layer().is_none() {
            return format!("Plan(num_key_value_heads={heads:?})");
        }
        format!("Plan(num_key_value_heads={heads:?}, storage={:?})", self.storage())
    }
}

impl Plan {
    fn fitting(&self, config: &Bound<'_, PyAny>) -> PyResult<ModelConfig> {
        let config = model_config(config)?;
        if config.0.num_key_value_heads == self.0.source_num_key_value_heads() {
            return Ok(config);
        }
        Err(argument("the plan was built for a model with other K/V heads"))
    }
}

/// The plan given, or `keep`.
pub(crate) fn read_or_keep(
    plan: Option<&Bound<'_, PyAny>>,
    config: &mqadapt_core::ModelConfig,
) -> PyResult<mqadapt_core::Plan> {
    plan.map_or_else(|| Ok(mqadapt_core::Plan::keep(config)), |plan| read(plan, config))
}

/// A plan from a `Plan`, its text, or the name of a plan file.
pub(crate) fn read(plan: &Bound<'_, PyAny>, config: &mqadapt_core::ModelConfig) -> PyResult<mqadapt_core::Plan> {
    if let Ok(plan) = plan.extract::<Plan>() {
        let source = mqadapt_core::Plan::keep(config);
        return mqadapt_core::Plan::from_layers(plan.0.layers(), source.layers()).or_raise();
    }
    if let Ok(heads) = plan.extract::<Vec<Whole>>() {
        let heads = counts("num_key_value_heads", &heads)?;
        return mqadapt_core::Plan::from_heads(&heads, config).or_raise();
    }
    let unknown = |_| argument("a plan is a text, the name of a file, or a list with the K/V heads of each layer");
    let text: Text = plan.str().map_err(unknown)?.extract()?; // a path has its text
    mqadapt_checkpoint::read_plan(&text, config).or_raise()
}
