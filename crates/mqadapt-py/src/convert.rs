//! `convert` and its report.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::path::{Path, PathBuf};

use mqadapt_calibrate::CalibratedLayers;
use mqadapt_checkpoint::Checkpoint;
use mqadapt_convert::ConvertOptions;
use mqadapt_core::Progress;
use mqadapt_model::Spill;
use pyo3::exceptions::PyUserWarning;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arguments::{Place, Text, Whole, dtype as parse_dtype, merge_options};
use crate::calibration::{self, Calibration};
use crate::errors::{IntoPyErr, OrRaise, failure};
use crate::merge::Merge;
use crate::source::{local_path, name};
use crate::stream::Shards;
use crate::{merge, plan, work};

/// What a conversion did.
#[pyclass(module = "mqadapt_rs", frozen)]
pub(crate) struct ConversionReport(mqadapt_convert::ConversionReport);

#[pymethods]
impl ConversionReport {
    /// The content of the `mqadapt.json` that was written.
    #[getter]
    fn manifest<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        to_dict(py, &self.0.manifest.to_json())
    }

    #[getter]
    fn bytes_read(&self) -> u64 {
        self.0.bytes_read
    }

    #[getter]
    fn bytes_written(&self) -> u64 {
        self.0.bytes_written
    }

    #[getter]
    fn seconds(&self) -> f64 {
        self.0.seconds
    }

    #[getter]
    fn peak_rss_bytes(&self) -> Option<u64> {
        self.0.peak_rss_bytes
    }

    /// Values that are infinite or not a number, of each tensor that this run copied as it is.
    #[getter]
    fn not_finite(&self) -> BTreeMap<String, u64> {
        self.0.not_finite.clone()
    }

    /// The manifest and the figures of this run in one dictionary.
    fn to_dict<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let out = self.manifest(py)?;
        out.set_item("bytes_read", self.0.bytes_read)?;
        out.set_item("bytes_written", self.0.bytes_written)?;
        out.set_item("seconds", self.0.seconds)?;
        out.set_item("peak_rss_bytes", self.0.peak_rss_bytes)?;
        if !self.0.not_finite.is_empty() {
            out.set_item("not_finite", self.not_finite())?;
        }
        out.set_item("redone", &self.0.redone)?;
        Ok(out)
    }

    #[getter]
    fn redone(&self) -> Vec<String> {
        self.0.redone.clone()
    }

    fn __repr__(&self) -> String {
        let manifest = &self.0.manifest;
        format!(
            "ConversionReport(num_key_value_heads={:?}, kv_bytes_per_token={} -> {}, bytes_written={}, seconds={:.3})",
            manifest.num_key_value_heads_after,
            manifest.kv_bytes_per_token_before,
            manifest.kv_bytes_per_token_after,
            self.0.bytes_written,
            self.0.seconds,
        )
    }
}

fn to_dict<'py>(py: Python<'py>, json: &str) -> PyResult<Bound<'py, PyDict>> {
    let value = py.import("json")?.call_method1("loads", (json,))?;
    value.cast_into().map_err(|_| failure("the manifest is not an object"))
}

/// Writes a checkpoint in which every layer has the K/V heads that the plan says.
#[pyfunction]
#[pyo3(
    signature = (src, dst, plan = None, method = None, *, seed = None, dtype = None,
        overwrite = false, resume = false, max_shard_size = None, max_memory = Whole::from(64 << 20), sync = true,
        calibration = None, stream_download = false, progress = None),
    text_signature = "(src, dst, plan='keep', method=None, *, seed=None, dtype=None, overwrite=False, resume=False, max_shard_size=None, max_memory=67108864, sync=True, calibration=None, stream_download=False, progress=None)"
)]
#[allow(clippy::too_many_arguments, clippy::fn_params_excessive_bools)] // the keywords of the Python function
pub(crate) fn convert(
    py: Python<'_>,
    src: &Bound<'_, PyAny>,
    dst: Place,
    plan: Option<&Bound<'_, PyAny>>,
    method: Option<Text>,
    seed: Option<Whole>,
    dtype: Option<Text>,
    overwrite: bool,
    resume: bool,
    max_shard_size: Option<Whole>,
    max_memory: Whole,
    sync: bool,
    calibration: Option<&Bound<'_, Calibration>>,
    stream_download: bool,
    progress: Option<&Bound<'_, PyAny>>,
) -> PyResult<ConversionReport> {
    let Merge { method, seed, calibration } = merge::resolve(src, plan, method, seed, calibration)?;
    let calibration = calibration::needed(method, calibration.as_ref())?;
    let dtype = parse_dtype(dtype.as_deref())?;
    let max_shard_size = max_shard_size.map(|size| size.within("max_shard_size", 1..=u64::MAX)).transpose()?;
    let max_memory = max_memory.within("max_memory", 0..=u64::MAX)?;
    let (checkpoint, shards) = if stream_download {
        let (checkpoint, shards) = Shards::open(src, &dst)?;
        (checkpoint, Some(shards))
    } else {
        let path = local_path(src, false)?;
        (py.detach(|| Checkpoint::open(&path)).or_raise()?, None)
    };
    let plan = plan::read_or_keep(plan, checkpoint.config())?;
    let options = ConvertOptions {
        dtype,
        overwrite,
        resume,
        max_shard_size,
        max_memory,
        sync,
        source_name: Some(name(src)?),
        method_options: calibration.map(Calibration::describe).unwrap_or_default(),
        ..ConvertOptions::new(method, merge_options(seed, checkpoint.config()))
    };
    let written = dtype.unwrap_or(checkpoint.dtype());
    let work = |progress: &dyn Progress| -> Result<_, Failed> {
        let Some(calibration) = calibration else {
            return mqadapt_convert::convert(&checkpoint, &dst, &plan, &options, progress).map_err(Failed::Convert);
        };
        let spill = Spill { max_memory, folder: folder_of(&dst) };
        let merge =
            calibration.merge(&checkpoint, method, written, Some(spill), progress).map_err(Failed::Calibrate)?;
        let mut layers = CalibratedLayers::new(merge, progress);
        mqadapt_convert::convert_layers(&checkpoint, &dst, &plan, &options, &mut layers, progress)
            .map_err(Failed::Convert)
    };
    let stopped = |py: Python<'_>| shards.iter().for_each(|shards| shards.stop(py));
    let outcome = work::run_or(py, progress, stopped, work);
    if let Some(shards) = &shards {
        shards.close(py, resume && outcome.is_err())?;
    }
    let report = outcome?;
    warn_not_finite(py, &report.not_finite)?;
    for damage in &report.redone {
        let message = CString::new(damage.replace('\0', "\\0"))?;
        PyErr::warn(py, &py.get_type::<PyUserWarning>(), &message, 1)?;
    }
    Ok(ConversionReport(report))
}

/// Says that values were copied that no model computes with.
fn warn_not_finite(py: Python<'_>, found: &BTreeMap<String, u64>) -> PyResult<()> {
    let Some((name, count)) = found.first_key_value() else { return Ok(()) };
    let others = match found.len() {
        1 => String::new(),
        tensors => format!(" (and {} other tensors)", tensors - 1),
    };
    let message = format!(
        "tensor '{name}'{others} holds {count} values that are infinite or NaN; the plan does not change it, so they were \
         copied as they are: get an intact copy of the model"
    );
    let message = CString::new(message.replace('\0', "\\0"))?;
    PyErr::warn(py, &py.get_type::<PyUserWarning>(), &message, 1)
}

/// Where `dst` is going to be: a place with room for what does not fit into memory.
fn folder_of(dst: &Path) -> PathBuf {
    let there = dst.ancestors().skip(1).find(|folder| folder.is_dir());
    there.map_or_else(|| PathBuf::from("."), Path::to_owned)
}

/// A conversion that began with statistics can fail in either.
enum Failed {
    Calibrate(mqadapt_calibrate::Error),
    Convert(mqadapt_convert::Error),
}

impl IntoPyErr for Failed {
    fn into_py_err(self) -> PyErr {
        match self {
            Self::Calibrate(error) => error.into_py_err(),
            Self::Convert(error) => error.into_py_err(),
        }
    }
}
