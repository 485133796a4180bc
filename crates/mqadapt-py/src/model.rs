//! `Model`: the forward pass. One long file, since `PyO3` takes the methods of a class in one block.

use std::sync::Arc;

use mqadapt_calibrate::{load_calibrated, with_merged_layers};
use mqadapt_checkpoint::{Checkpoint, Content, MAX_CONFIG_BYTES, read_small};
use mqadapt_core::Progress;
use mqadapt_kernels::Precision;
use mqadapt_model::{Device, GenerateOptions, Likelihood, LoadOptions, MOST_TOKENS_IN_FLIGHT, WeightFormat};
use numpy::{IntoPyArray, PyArray1, PyArray2, PyArrayMethods};
use pyo3::prelude::*;
use pyo3::types::PyType;

use crate::arguments::{Real, Text, Whole, counts, dtype as parse_dtype, merge_options, sequences, token_ids};
use crate::calibration::{self, Calibration};
use crate::config::{ModelConfig, parse_storage};
use crate::errors::{IntoPyErr, OrRaise, argument};
use crate::merge::{self, Merge};
use crate::plan::{self, Plan};
use crate::source::local_path;
use crate::states::{HiddenStates, RequestStates};
use crate::work;

/// Passes that are timed in one call, at most.
const MOST_PASSES: u64 = 1 << 20;

/// Sequences that are decoded side by side in a measurement, at most.
const MOST_SEQUENCES: u64 = 1 << 16;

/// A decoder-only language model, ready to run.
#[pyclass(module = "mqadapt_rs", frozen)]
pub(crate) struct Model {
    inner: mqadapt_model::Model,
    checkpoint: Arc<Checkpoint>,
    dtype: mqadapt_core::DType,
    stop_tokens: Vec<u32>,
}

impl Model {
    /// Which model this is, for [`work::as_callback_of`].
    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Runs work that uses the model's cache.
    fn run<T: Send, E: IntoPyErr + Send>(
        &self,
        py: Python<'_>,
        progress: Option<&Bound<'_, PyAny>>,
        work: impl FnOnce(&dyn Progress) -> Result<T, E> + Send,
    ) -> PyResult<T> {
        work::not_in_callback_of(self.address())?;
        // on this thread nothing but `progress` is called meanwhile
        work::as_callback_of(self.address(), || work::run(py, progress, work))
    }
}

#[pymethods]
impl Model {
    /// Loads a model; a plan is applied in memory.
    #[classmethod]
    #[pyo3(
        signature = (src, plan = None, method = None, seed = None, dtype = None, *,
            device = Text::from("cpu"), weights = Text::from("stored"), kv_dtype = None, kv = None, precision = Text::from("fast"),
            max_tokens_in_flight = Whole::from(1024), calibration = None, progress = None),
        text_signature = "($cls, src, plan='keep', method=None, seed=None, dtype=None, *, device='cpu', weights='stored', kv_dtype=None, kv=None, precision='fast', max_tokens_in_flight=1024, calibration=None, progress=None)"
    )]
    #[allow(clippy::too_many_arguments)] // the keywords of the Python function
    fn load(
        cls: &Bound<'_, PyType>,
        src: &Bound<'_, PyAny>,
        plan: Option<&Bound<'_, PyAny>>,
        method: Option<Text>,
        seed: Option<Whole>,
        dtype: Option<Text>,
        device: Text,
        weights: Text,
        kv_dtype: Option<Text>,
        kv: Option<Text>,
        precision: Text,
        max_tokens_in_flight: Whole,
        calibration: Option<&Bound<'_, Calibration>>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let py = cls.py();
        let Merge { method: parsed, seed, calibration } = merge::resolve(src, plan, method, seed, calibration)?;
        let method = parsed.name.to_owned();
        let (dtype, kv_dtype) = (parse_dtype(dtype.as_deref())?, parse_dtype(kv_dtype.as_deref())?);
        let precision = match &*precision {
            "fast" => Precision::Fast,
            "exact" => Precision::Exact,
            other => return Err(argument(format!("precision '{other}' is not one of fast, exact"))),
        };
        let device = Device::parse(&device).or_raise()?;
        let most = MOST_TOKENS_IN_FLIGHT as u64;
        let max_tokens_in_flight = max_tokens_in_flight.within("max_tokens_in_flight", 1..=most)?;
        let path = local_path(src, false)?;
        let checkpoint = py.detach(|| Checkpoint::open(&path)).or_raise()?;
        let mut plan = plan::read_or_keep(plan, checkpoint.config())?;
        if let Some(kv) = kv {
            plan = plan.stored(parse_storage("kv", &kv)?).or_raise()?;
        }
        let calibration = if plan.is_keep() { None } else { calibration::needed(parsed, calibration.as_ref())? };
        let options = LoadOptions {
            plan: Some(plan),
            method,
            merge: merge_options(seed, checkpoint.config()),
            dtype,
            weights: WeightFormat::parse(&weights).or_raise()?,
            kv_dtype,
            device,
            max_tokens_in_flight,
            precision,
        };
        let inner = work::run(py, progress, |progress| -> Result<_, mqadapt_calibrate::Error> {
            match calibration {
                None => Ok(mqadapt_model::Model::load(&checkpoint, &options, progress)?),
                Some(calibration) => {
                    let dtype = dtype.unwrap_or(checkpoint.dtype());
                    let mut merge = calibration.merge(&checkpoint, parsed, dtype, None, progress)?;
                    load_calibrated(&checkpoint, &options, &mut merge, progress)
                }
            }
        })?;
        let stop_tokens = stop_tokens(&checkpoint)?;
        let dtype = dtype.unwrap_or(checkpoint.dtype());
        Ok(Self { inner, checkpoint: Arc::new(checkpoint), dtype, stop_tokens })
    }

    /// The same model under another plan for its checkpoint.
    #[pyo3(
        signature = (plan, method = None, seed = None, *, calibration = None, progress = None),
        text_signature = "($self, plan, method=None, seed=None, *, calibration=None, progress=None)"
    )]
    fn with_plan(
        &self,
        py: Python<'_>,
        plan: &Bound<'_, PyAny>,
        method: Option<Text>,
        seed: Option<Whole>,
        calibration: Option<&Bound<'_, Calibration>>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let src = self.checkpoint.path().into_pyobject(py)?.into_any();
        let Merge { method, seed, calibration } = merge::resolve(&src, Some(plan), method, seed, calibration)?;
        let config = self.checkpoint.config();
        let plan = plan::read(plan, config)?;
        let merge = merge_options(seed, config);
        let calibration = if plan.is_keep() { None } else { calibration::needed(method, calibration.as_ref())? };
        let inner = work::run(py, progress, |progress| -> Result<_, mqadapt_calibrate::Error> {
            match calibration {
                None if plan.is_keep() => Ok(self.inner.with_plan(&self.checkpoint, &plan, "mean", &merge)?),
                None => Ok(self.inner.with_plan(&self.checkpoint, &plan, method.name, &merge)?),
                Some(calibration) => {
                    let mut layers = calibration.merge(&self.checkpoint, method, self.dtype, None, progress)?;
                    with_merged_layers(&self.inner, &self.checkpoint, &plan, &mut layers, progress)
                }
            }
        })?;
        let (checkpoint, stop_tokens) = (Arc::clone(&self.checkpoint), self.stop_tokens.clone());
        Ok(Self { inner, checkpoint, dtype: self.dtype, stop_tokens })
    }

    /// The same model with some layers taken from others of the same checkpoint.
    fn with_layers_of(&self, layers: Vec<(Whole, Bound<'_, Self>)>) -> PyResult<Self> {
        let layers: PyResult<Vec<_>> =
            layers.iter().map(|(layer, donor)| Ok((layer.count("a layer of layers")?, &donor.get().inner))).collect();
        let layers = layers?;
        let inner = self.inner.with_layers_of(&layers).or_raise()?;
        let (checkpoint, stop_tokens) = (Arc::clone(&self.checkpoint), self.stop_tokens.clone());
        Ok(Self { inner, checkpoint, dtype: self.dtype, stop_tokens })
    }

    #[getter]
    fn config(&self) -> ModelConfig {
        ModelConfig(self.inner.config().clone())
    }

    #[getter]
    fn plan(&self) -> Plan {
        Plan(self.inner.plan().clone())
    }

    #[getter]
    fn dtype(&self) -> &'static str {
        self.dtype.name()
    }

    #[getter]
    fn fingerprint(&self) -> &str {
        self.inner.fingerprint()
    }

    #[getter]
    fn stop_tokens(&self) -> Vec<u32> {
        self.stop_tokens.clone()
    }

    fn kv_bytes(&self) -> PyResult<u64> {
        work::not_in_callback_of(self.address())?;
        Ok(self.inner.kv_bytes())
    }

    #[getter]
    fn kv_bytes_per_token(&self) -> u64 {
        self.inner.kv_bytes_per_token()
    }

    #[getter]
    fn kv_value_bytes(&self) -> usize {
        self.inner.kv_value_bytes()
    }

    /// Bytes that one decode step reads with `depth` tokens cached.
    fn bytes_per_step(&self, depth: Whole) -> PyResult<u64> {
        Ok(self.inner.bytes_per_step(depth.within("depth", 0..=u32::MAX.into())?))
    }

    /// Seconds of each of some decode steps with `depth` tokens cached.
    #[pyo3(
        signature = (depth, steps, sequences = Whole::from(1), *, progress = None),
        text_signature = "($self, depth, steps, sequences=1, *, progress=None)"
    )]
    fn measure_decode(
        &self,
        py: Python<'_>,
        depth: Whole,
        steps: Whole,
        sequences: Whole,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<f64>> {
        let (depth, steps, sequences) =
            (depth.count("depth")?, steps.count("steps")?, sequences.within("sequences", 1..=MOST_SEQUENCES)?);
        self.run(py, progress, |progress| self.inner.measure_decode(depth, steps, sequences, progress))
    }

    /// Seconds of each of some passes over a prompt.
    #[pyo3(signature = (tokens, passes, *, progress = None))]
    fn measure_prefill(
        &self,
        py: Python<'_>,
        tokens: Whole,
        passes: Whole,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<f64>> {
        let (tokens, passes) = (tokens.positive("tokens")?, passes.within("passes", 0..=MOST_PASSES)?);
        self.run(py, progress, |progress| self.inner.measure_prefill(tokens, passes, progress))
    }

    /// Logits of every position.
    #[pyo3(signature = (ids, *, progress = None))]
    fn logits<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let ids = token_ids(ids)?;
        let logits = self.run(py, progress, |progress| self.inner.logits(&ids, progress))?;
        logits.into_pyarray(py).reshape([ids.len(), self.inner.config().vocab_size])
    }

    /// Logits of every position, the sequence being fed in pieces of these lengths.
    #[pyo3(signature = (ids, steps, *, progress = None))]
    fn logits_in_steps<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        steps: Vec<Whole>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArray2<f32>>> {
        let (ids, steps) = (token_ids(ids)?, counts("steps", &steps)?);
        let logits = self.run(py, progress, |progress| self.inner.logits_in_steps(&ids, &steps, progress))?;
        logits.into_pyarray(py).reshape([ids.len(), self.inner.config().vocab_size])
    }

    /// The embeddings, the output of every layer but the last, and the final norm's output.
    #[pyo3(signature = (ids, *, progress = None))]
    fn hidden_states<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Vec<Bound<'py, PyArray2<f32>>>> {
        let ids = token_ids(ids)?;
        let states = self.run(py, progress, |progress| self.inner.hidden_states(&ids, progress))?;
        let shape = [ids.len(), self.inner.config().hidden_size];
        states.into_iter().map(|state| state.into_pyarray(py).reshape(shape)).collect()
    }

    /// Log-likelihood of each continuation after its context.
    #[pyo3(signature = (requests, *, progress = None))]
    fn loglikelihood(
        &self,
        py: Python<'_>,
        requests: Vec<(Bound<'_, PyAny>, Bound<'_, PyAny>)>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<Likelihood>> {
        let requests: PyResult<Vec<_>> = requests
            .iter()
            .map(|(context, continuation)| Ok((token_ids(context)?, token_ids(continuation)?)))
            .collect();
        let requests = requests?;
        self.run(py, progress, |progress| self.inner.loglikelihood(&requests, progress))
    }

    /// As `loglikelihood`, going on from residual streams that were kept, and keeping some.
    #[pyo3(signature = (requests, start = None, keep = Vec::new(), *, progress = None))]
    fn loglikelihood_from(
        &self,
        py: Python<'_>,
        requests: Vec<(Bound<'_, PyAny>, Bound<'_, PyAny>)>,
        start: Option<&Bound<'_, RequestStates>>,
        keep: Vec<Whole>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<(Vec<Likelihood>, Vec<RequestStates>)> {
        let requests: PyResult<Vec<_>> = requests
            .iter()
            .map(|(context, continuation)| Ok((token_ids(context)?, token_ids(continuation)?)))
            .collect();
        let (requests, start, keep) = (requests?, start.map(|start| &start.get().0), counts("keep", &keep)?);
        let (scores, kept) =
            self.run(py, progress, |progress| self.inner.loglikelihood_from(&requests, start, &keep, progress))?;
        Ok((scores, kept.into_iter().map(RequestStates).collect()))
    }

    /// Perplexity over non-overlapping windows.
    #[pyo3(signature = (ids, context, windows = None, *, progress = None))]
    fn perplexity(
        &self,
        py: Python<'_>,
        ids: &Bound<'_, PyAny>,
        context: Whole,
        windows: Option<Whole>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<f64> {
        let (ids, context) = (token_ids(ids)?, context.within("context", 2..=u64::MAX)?);
        let windows = windows.map(|windows| windows.positive("windows")).transpose()?;
        let out = self.run(py, progress, |progress| self.inner.perplexity(&ids, context, windows, progress))?;
        Ok(out.perplexity)
    }

    /// New tokens after one prompt, or after each of several.
    #[pyo3(
        signature = (ids, max_new_tokens = Whole::from(256), temperature = Real(0.0), *, top_k = None, top_p = None,
            seed = Whole::from(0), stop_tokens = None, on_token = None, progress = None),
        text_signature = "($self, ids, max_new_tokens=256, temperature=0.0, *, top_k=None, top_p=None, seed=0, stop_tokens=None, on_token=None, progress=None)"
    )]
    #[allow(clippy::too_many_arguments)] // the keywords of the Python function
    fn generate<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        max_new_tokens: Whole,
        temperature: Real,
        top_k: Option<Whole>,
        top_p: Option<Real>,
        seed: Whole,
        stop_tokens: Option<&Bound<'py, PyAny>>,
        on_token: Option<Py<PyAny>>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let one = ids.len()? == 0 || ids.get_item(0)?.extract::<i64>().is_ok();
        let prompts = if one { vec![token_ids(ids)?] } else { sequences(ids)? };
        let stop_tokens = stop_tokens.map_or_else(|| Ok(self.stop_tokens.clone()), token_ids)?;
        let options = GenerateOptions {
            max_new_tokens: max_new_tokens.count("max_new_tokens")?,
            temperature: temperature.0,
            top_k: top_k.map(|top_k| top_k.positive("top_k")).transpose()?,
            top_p: top_p.map(|top_p| top_p.0),
            seed: seed.seed()?,
            stop_tokens,
        };
        let mut raised = None;
        let new = self.run(py, progress, |progress| {
            let mut goes_on = |index: usize, token: u32| {
                let Some(on_token) = on_token.as_ref().filter(|_| raised.is_none()) else { return raised.is_none() };
                let answer = work::as_callback_of(self.address(), || {
                    Python::attach(|py| on_token.call1(py, (index, token)).map(|answer| !is_false(answer.bind(py))))
                });
                answer.unwrap_or_else(|error| {
                    raised = Some(error);
                    false
                })
            };
            self.inner.generate(&prompts, &options, &mut goes_on, progress)
        })?;
        match (raised, one) {
            (Some(error), _) => Err(error),
            (None, true) => new.into_iter().next().unwrap_or_default().into_pyobject(py),
            (None, false) => new.into_pyobject(py),
        }
    }

    /// The residual streams entering a layer.
    #[pyo3(signature = (layer_idx, sequences, *, progress = None))]
    fn hidden_before(
        &self,
        py: Python<'_>,
        layer_idx: Whole,
        sequences: &Bound<'_, PyAny>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<HiddenStates> {
        let (sequences, layer_idx) = (self::sequences(sequences)?, layer_idx.count("layer_idx")?);
        self.run(py, progress, |progress| self.inner.hidden_before(layer_idx, &sequences, progress)).map(HiddenStates)
    }

    /// Goes on from residual streams up to the entrance of a layer.
    #[pyo3(signature = (hidden, layer_idx, *, progress = None))]
    fn forward_from(
        &self,
        py: Python<'_>,
        hidden: &Bound<'_, HiddenStates>,
        layer_idx: Whole,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<HiddenStates> {
        let (hidden, layer_idx) = (&hidden.get().0, layer_idx.count("layer_idx")?);
        self.run(py, progress, |progress| self.inner.forward_from(hidden, layer_idx, progress)).map(HiddenStates)
    }

    /// Negative log-likelihood of every token but the first of each sequence.
    #[pyo3(signature = (hidden, sequences, *, progress = None))]
    fn nll<'py>(
        &self,
        py: Python<'py>,
        hidden: &Bound<'py, HiddenStates>,
        sequences: &Bound<'py, PyAny>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArray1<f64>>> {
        let (hidden, sequences) = (&hidden.get().0, self::sequences(sequences)?);
        let out = self.run(py, progress, |progress| self.inner.nll(hidden, &sequences, progress))?;
        Ok(out.into_pyarray(py))
    }

    /// Divergence of the next-token distributions from those of another model.
    #[pyo3(signature = (reference, hidden, *, progress = None))]
    fn kl_divergence<'py>(
        &self,
        py: Python<'py>,
        reference: &Bound<'py, HiddenStates>,
        hidden: &Bound<'py, HiddenStates>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArray1<f64>>> {
        let (reference, hidden) = (&reference.get().0, &hidden.get().0);
        let out = self.run(py, progress, |progress| self.inner.kl_divergence(reference, hidden, progress))?;
        Ok(out.into_pyarray(py))
    }

    /// As `kl_divergence`, of several models from one.
    #[pyo3(signature = (reference, hidden, *, progress = None))]
    fn kl_divergences<'py>(
        &self,
        py: Python<'py>,
        reference: &Bound<'py, HiddenStates>,
        hidden: Vec<Bound<'py, HiddenStates>>,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Vec<Bound<'py, PyArray1<f64>>>> {
        let (reference, hidden) = (&reference.get().0, hidden.iter().map(|states| &states.get().0).collect::<Vec<_>>());
        let out = self.run(py, progress, |progress| self.inner.kl_divergences(reference, &hidden, progress))?;
        Ok(out.into_iter().map(|values| values.into_pyarray(py)).collect())
    }

    fn __repr__(&self) -> String {
        let config = self.inner.config();
        format!(
            "Model(model_type='{}', num_key_value_heads={:?}, dtype='{}', fingerprint='{}')",
            config.family.model_type,
            config.num_key_value_heads,
            self.dtype.name(),
            self.inner.fingerprint(),
        )
    }
}

/// Whether an answer is `False` (or numpy's): `None`, which functions without a result give, is not.
fn is_false(answer: &Bound<'_, PyAny>) -> bool {
    answer.extract::<bool>().is_ok_and(|answer| !answer)
}

/// The tokens that end a text: `eos_token_id` of `generation_config.json`, else of `config.json`.
fn stop_tokens(checkpoint: &Checkpoint) -> PyResult<Vec<u32>> {
    let files = checkpoint.side_files().or_raise()?;
    let generation = files.into_iter().find(|file| file.name == "generation_config.json");
    let text = generation.and_then(|file| match file.content {
        Content::File(path) => read_small(&path, MAX_CONFIG_BYTES).ok(),
        Content::Bytes(bytes) => Some(bytes),
    });
    // a file that cannot be parsed counts as none: it is not needed to run the model
    let parsed = text.and_then(|text| serde_json::from_slice::<serde_json::Value>(&text).ok()).unwrap_or_default();
    let ids = |value: &serde_json::Value| -> Vec<u32> {
        let one = |id: &serde_json::Value| id.as_u64().and_then(|id| u32::try_from(id).ok());
        value.as_array().map_or_else(|| one(value).into_iter().collect(), |list| list.iter().filter_map(one).collect())
    };
    let found = ids(&parsed["eos_token_id"]);
    Ok(if found.is_empty() { ids(&checkpoint.config().json["eos_token_id"]) } else { found })
}
