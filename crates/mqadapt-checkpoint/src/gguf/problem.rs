//! What is wrong with a GGUF file, before the path is known.

use std::path::Path;

use crate::Error;

/// A malformed or unsupported file, or one that could not be read.
#[derive(Debug)]
pub(super) enum Problem {
    /// The place in the file, and what was expected and found there.
    Malformed { place: String, detail: String },
    /// The operating system's error, or a file that shrank.
    Read(Error),
}

pub(super) type Parsed<T> = Result<T, Problem>;

impl Problem {
    /// A place such as `the version`, and what is wrong there.
    pub(super) fn new(place: impl Into<String>, detail: impl Into<String>) -> Self {
        Self::Malformed { place: place.into(), detail: detail.into() }
    }

    pub(super) fn key(key: &str, detail: impl Into<String>) -> Self {
        Self::new(format!("metadata key '{}'", key.escape_debug()), detail)
    }

    pub(super) fn tensor(name: &str, detail: impl Into<String>) -> Self {
        Self::new(format!("tensor '{}'", name.escape_debug()), detail)
    }

    pub(super) fn missing_key(key: &str) -> Self {
        Self::key(key, "is missing")
    }

    pub(super) fn in_file(self, path: &Path) -> Error {
        match self {
            Self::Malformed { place, detail } => {
                Error::Gguf { path: path.to_owned(), detail: format!("{place} {detail}") }
            }
            Self::Read(error) => error,
        }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        Self::Read(error)
    }
}
