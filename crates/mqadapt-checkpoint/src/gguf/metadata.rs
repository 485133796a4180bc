//! The key-value pairs at the head of a GGUF file, with typed access.

use std::collections::BTreeMap;

use super::problem::{Parsed, Problem};

/// A metadata value. Arrays hold scalars or strings; the reader refuses arrays of arrays, as llama.cpp does.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// Any unsigned integer type.
    Unsigned(u64),
    /// Any signed integer type.
    Signed(i64),
    /// `float32`.
    F32(f32),
    /// `float64`.
    F64(f64),
    Bool(bool),
    Text(String),
    Unsigneds(Vec<u64>),
    Signeds(Vec<i64>),
    F32s(Vec<f32>),
    F64s(Vec<f64>),
    Bools(Vec<bool>),
    Texts(Vec<String>),
}

impl Value {
    fn kind(&self) -> &'static str {
        match self {
            Self::Unsigned(_) | Self::Signed(_) => "an integer",
            Self::F32(_) | Self::F64(_) => "a float",
            Self::Bool(_) => "a boolean",
            Self::Text(_) => "a string",
            Self::Unsigneds(_) | Self::Signeds(_) => "an array of integers",
            Self::F32s(_) | Self::F64s(_) => "an array of floats",
            Self::Bools(_) => "an array of booleans",
            Self::Texts(_) => "an array of strings",
        }
    }

    fn integer(&self) -> Option<u64> {
        match *self {
            Self::Unsigned(n) => Some(n),
            Self::Signed(n) => u64::try_from(n).ok(),
            _ => None,
        }
    }

    fn integers(&self) -> Option<Vec<u64>> {
        match self {
            Self::Unsigneds(numbers) => Some(numbers.clone()),
            Self::Signeds(numbers) => numbers.iter().map(|&n| u64::try_from(n).ok()).collect(),
            _ => None,
        }
    }
}

/// All pairs of a file, in the order of their keys.
#[derive(Debug, Clone, Default)]
pub(super) struct Metadata(pub(super) BTreeMap<String, Value>);

impl Metadata {
    fn typed<'a, T>(&'a self, key: &str, expected: &str, read: impl Fn(&'a Value) -> Option<T>) -> Parsed<Option<T>> {
        let Some(value) = self.0.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| Problem::key(key, format!("expected {expected}, found {}", value.kind())))
    }

    pub(super) fn text(&self, key: &str) -> Parsed<Option<&str>> {
        self.typed(key, "a string", |value| match value {
            Value::Text(text) => Some(text.as_str()),
            _ => None,
        })
    }

    pub(super) fn flag(&self, key: &str) -> Parsed<Option<bool>> {
        self.typed(key, "a boolean", |value| match value {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        })
    }

    pub(super) fn integer(&self, key: &str) -> Parsed<Option<u64>> {
        self.typed(key, "an integer of at least 0", Value::integer)
    }

    pub(super) fn required_integer(&self, key: &str) -> Parsed<u64> {
        self.integer(key)?.ok_or_else(|| Problem::missing_key(key))
    }

    /// A float with the shortest decimal that its own type prints: the `float32` nearest to 1e-5 reads as 1e-5.
    pub(super) fn float(&self, key: &str) -> Parsed<Option<f64>> {
        self.typed(key, "a finite float", |value| match *value {
            Value::F32(number) if number.is_finite() => number.to_string().parse().ok(),
            Value::F64(number) if number.is_finite() => Some(number),
            _ => None,
        })
    }

    pub(super) fn texts(&self, key: &str) -> Parsed<Option<&[String]>> {
        self.typed(key, "an array of strings", |value| match value {
            Value::Texts(texts) => Some(texts.as_slice()),
            _ => None,
        })
    }

    pub(super) fn floats(&self, key: &str) -> Parsed<Option<Vec<f32>>> {
        self.typed(key, "an array of floats", |value| match value {
            Value::F32s(numbers) => Some(numbers.clone()),
            Value::F64s(numbers) => Some(numbers.iter().map(|&n| n as f32).collect()),
            Value::Signeds(numbers) => Some(numbers.iter().map(|&n| n as f32).collect()),
            _ => None,
        })
    }

    pub(super) fn integers(&self, key: &str) -> Parsed<Option<Vec<u64>>> {
        self.typed(key, "an array of integers of at least 0", Value::integers)
    }

    /// One number for each of `layers`: an array of that many, or one number for all of them.
    pub(super) fn per_layer(&self, key: &str, layers: usize) -> Parsed<Option<Vec<u64>>> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Unsigned(_) | Value::Signed(_)) => Ok(self.integer(key)?.map(|n| vec![n; layers])),
            Some(_) => {
                let numbers = self.integers(key)?.unwrap_or_default();
                if numbers.len() == layers {
                    return Ok(Some(numbers));
                }
                Err(Problem::key(key, format!("expected {layers} entries, one per layer, found {}", numbers.len())))
            }
        }
    }
}

/// The keys of a model's architecture, which begin with its name: `llama.block_count`.
#[derive(Debug, Clone, Copy)]
pub(super) struct ModelKeys<'a> {
    pub metadata: &'a Metadata,
    pub architecture: &'static str,
}

impl ModelKeys<'_> {
    /// The whole key, for messages too.
    pub(super) fn key(self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    pub(super) fn integer(self, name: &str) -> Parsed<Option<u64>> {
        self.metadata.integer(&self.key(name))
    }

    pub(super) fn required_integer(self, name: &str) -> Parsed<u64> {
        self.metadata.required_integer(&self.key(name))
    }

    pub(super) fn float(self, name: &str) -> Parsed<Option<f64>> {
        self.metadata.float(&self.key(name))
    }

    /// A float above 0.
    pub(super) fn positive(self, name: &str) -> Parsed<Option<f64>> {
        match self.float(name)? {
            Some(number) if number <= 0.0 => Err(self.problem(name, format!("must be positive; found {number}"))),
            number => Ok(number),
        }
    }

    pub(super) fn per_layer(self, name: &str, layers: usize) -> Parsed<Option<Vec<u64>>> {
        self.metadata.per_layer(&self.key(name), layers)
    }

    pub(super) fn missing(self, name: &str) -> Problem {
        Problem::missing_key(&self.key(name))
    }

    pub(super) fn problem(self, name: &str, detail: impl Into<String>) -> Problem {
        Problem::key(&self.key(name), detail)
    }
}
