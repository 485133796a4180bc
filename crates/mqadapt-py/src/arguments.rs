//! Arguments that several functions take.
//!
//! In: what a caller gave, of whatever kind and size. Out: a Rust value, or an `ArgumentError` that names the argument and
//! what it may be; of another type altogether, Python's `TypeError`.

use std::ops::{Deref, RangeInclusive};
use std::path::{Path, PathBuf};

use mqadapt_compress::{METHODS, MergeOptions, Method};
use mqadapt_core::DType;
use pyo3::exceptions::{PyOverflowError, PyUnicodeError};
use pyo3::prelude::*;
use pyo3::types::PyString;

use crate::errors::argument;

/// A whole number of any size; what it may be is known where its name is.
pub(crate) enum Whole {
    Known(i128),
    /// Beyond that, in words.
    Beyond(String),
}

impl From<u64> for Whole {
    fn from(number: u64) -> Self {
        Self::Known(number.into())
    }
}

impl FromPyObject<'_, '_> for Whole {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let index = object.py().import("operator")?.getattr("index")?;
        let number = index.call1((object,))?; // a `TypeError` for what is no whole number
        if let Ok(known) = number.extract() {
            return Ok(Self::Known(known));
        }
        let sign = if number.lt(0)? { "negative number" } else { "number" };
        Ok(Self::Beyond(format!("a {sign} of {} bits", number.call_method0("bit_length")?)))
    }
}

impl Whole {
    /// The number, if it is in the range.
    pub(crate) fn within<T: TryFrom<u64>>(&self, name: &str, range: RangeInclusive<u64>) -> PyResult<T> {
        let found = match self {
            Self::Known(number) => {
                let fits = u64::try_from(*number).ok().filter(|number| range.contains(number));
                if let Some(number) = fits.and_then(|number| T::try_from(number).ok()) {
                    return Ok(number);
                }
                number.to_string()
            }
            Self::Beyond(words) => words.clone(),
        };
        let (low, high) = range.into_inner();
        let high = if high == u64::MAX { "2**64 - 1".to_owned() } else { high.to_string() };
        Err(argument(format!("{name} must be a whole number from {low} to {high}; found {found}")))
    }

    /// A number of things.
    pub(crate) fn count(&self, name: &str) -> PyResult<usize> {
        self.within(name, 0..=u64::MAX)
    }

    /// A number of things, at least one.
    pub(crate) fn positive(&self, name: &str) -> PyResult<usize> {
        self.within(name, 1..=u64::MAX)
    }

    /// A seed.
    pub(crate) fn seed(&self) -> PyResult<u64> {
        self.within("seed", 0..=u64::MAX)
    }
}

/// Every one a number of things.
pub(crate) fn counts(name: &str, numbers: &[Whole]) -> PyResult<Vec<usize>> {
    numbers.iter().map(|number| number.count(name)).collect()
}

/// A real number; a whole number that is too large for one is infinite.
pub(crate) struct Real(pub(crate) f64);

impl FromPyObject<'_, '_> for Real {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let number: PyResult<f64> = object.extract();
        match number {
            Err(error) if error.is_instance_of::<PyOverflowError>(object.py()) => {
                Ok(Self(if object.lt(0)? { f64::NEG_INFINITY } else { f64::INFINITY }))
            }
            number => number.map(Self),
        }
    }
}

/// A text; one that holds half of a surrogate pair is none.
pub(crate) struct Text(String);

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl Deref for Text {
    type Target = str;

    fn deref(&self) -> &str {
        &self.0
    }
}

impl FromPyObject<'_, '_> for Text {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let text = object.cast::<PyString>()?;
        text.extract().map(Self).map_err(|_: PyErr| not_unicode(&text.to_string_lossy()))
    }
}

/// A text that cannot be encoded.
fn not_unicode(lossy: &str) -> PyErr {
    argument(format!("'{lossy}': expected Unicode text, found half of a surrogate pair (shown as {})", '\u{fffd}'))
}

/// A path.
pub(crate) struct Place(pub(crate) PathBuf);

impl Deref for Place {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl FromPyObject<'_, '_> for Place {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, '_, PyAny>) -> PyResult<Self> {
        let path: PyResult<PathBuf> = object.extract();
        path.map(Self).map_err(|error| match object.str() {
            Ok(text) if error.is_instance_of::<PyUnicodeError>(object.py()) => not_unicode(&text.to_string_lossy()),
            _ => error,
        })
    }
}

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
    mqadapt_compress::method(name).ok_or_else(|| {
        let known: Vec<_> = METHODS.iter().map(|method| method.name).collect();
        argument(format!("method '{name}' is not one of {}", known.join(", ")))
    })
}

/// What a method is told about this model.
pub(crate) fn merge_options(seed: u64, config: &mqadapt_core::ModelConfig) -> MergeOptions {
    MergeOptions { seed, initializer_range: config.initializer_range }
}
