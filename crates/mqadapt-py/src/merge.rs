//! How a plan is merged: what the caller says, else what the plan file says, else the default.

use std::ffi::CString;

use mqadapt_compress::Method;
use mqadapt_core::MergeSettings;
use pyo3::exceptions::PyUserWarning;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::arguments::{Text, Whole, method as parse_method};
use crate::calibration::Calibration;
use crate::errors::{OrRaise, failure};
use crate::plan::Plan;

const DEFAULT_METHOD: &str = "mean";

/// Method, seed and calibration of a merge.
pub(crate) struct Merge<'py> {
    pub(crate) method: &'static Method,
    pub(crate) seed: u64,
    /// Not compared with the method yet.
    pub(crate) calibration: Option<Bound<'py, Calibration>>,
}

/// Reads how a plan file merges heads: `method` and options, by their names; empty for other plans.
#[pyfunction]
pub(crate) fn plan_merge_settings<'py>(py: Python<'py>, plan: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyDict>> {
    let json = serde_json::Value::Object(settings(plan)?.fields()).to_string();
    let fields = py.import("json")?.call_method1("loads", (json,))?;
    fields.cast_into().map_err(|_| failure("the settings of a plan file are not an object"))
}

fn settings(plan: &Bound<'_, PyAny>) -> PyResult<MergeSettings> {
    if plan.is_none() || plan.is_instance_of::<PyList>() || plan.cast::<Plan>().is_ok() {
        return Ok(MergeSettings::default());
    }
    // what has no text is refused where the plan is read
    let Ok(text) = plan.str().and_then(|text| text.extract::<Text>()) else { return Ok(MergeSettings::default()) };
    Ok(mqadapt_checkpoint::read_plan_file(&text).or_raise()?.map(|document| document.merge).unwrap_or_default())
}

/// The merge of a plan; warns where an argument overrides a plan file. Calibration text is read with the tokenizer of `src`.
pub(crate) fn resolve<'py>(
    src: &Bound<'py, PyAny>,
    plan: Option<&Bound<'py, PyAny>>,
    method: Option<Text>,
    seed: Option<Whole>,
    calibration: Option<&Bound<'py, Calibration>>,
) -> PyResult<Merge<'py>> {
    let py = src.py();
    let given = method.map(|name| parse_method(&name)).transpose()?;
    let seed = seed.map(|seed| seed.seed()).transpose()?;
    let settings = plan.map(settings).transpose()?.unwrap_or_default();
    let of_file = settings.method.as_deref();
    if let (Some(method), Some(other)) = (given, of_file.filter(|name| given.is_some_and(|given| given.name != *name)))
    {
        warn(py, &format!("the method {} overrides {other}, the method of the plan file", method.name))?;
    }
    if let (Some(seed), Some(other)) = (seed, settings.options.seed.filter(|&own| seed.is_some_and(|seed| seed != own)))
    {
        warn(py, &format!("the seed {seed} overrides {other}, the seed of the plan file"))?;
    }
    let method = match given {
        Some(method) => method,
        None => parse_method(of_file.unwrap_or(DEFAULT_METHOD))?,
    };
    let seed = seed.or(settings.options.seed).unwrap_or(0);
    let names_text = settings.options.calibration.is_some() || settings.options.stats.is_some();
    let calibration = match (calibration, plan) {
        (Some(calibration), _) => Some(calibration.clone()),
        (None, Some(plan)) if names_text && method.layer().is_some() => {
            let module = py.import("mqadapt_rs.plan_settings")?;
            let calibration = module.call_method1("load_calibration_of", (src, plan, method.name, seed))?;
            Some(calibration.cast_into().map_err(|_| failure("the calibration of a plan file is not a Calibration"))?)
        }
        _ => None,
    };
    Ok(Merge { method, seed, calibration })
}

fn warn(py: Python<'_>, message: &str) -> PyResult<()> {
    let message = CString::new(message.replace('\0', "\\0"))?;
    PyErr::warn(py, &py.get_type::<PyUserWarning>(), &message, 1)
}
