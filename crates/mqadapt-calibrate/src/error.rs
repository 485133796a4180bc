//! What can go wrong while layers are merged from calibration text.

use std::path::PathBuf;

use mqadapt_core::Interrupted;

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong. Every message says where, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The checkpoint cannot be read, or lacks a tensor.
    #[error(transparent)]
    Checkpoint(#[from] mqadapt_checkpoint::Error),
    /// The model cannot be run.
    #[error(transparent)]
    Model(mqadapt_model::Error),
    /// An invalid argument.
    #[error("{name} {detail}")]
    Argument {
        /// The argument's name.
        name: &'static str,
        /// What was expected and what was found.
        detail: String,
    },
    /// A layer cannot be merged.
    #[error("layer {layer_idx}: {source}")]
    Merge {
        /// The layer.
        layer_idx: usize,
        /// Why not.
        source: mqadapt_compress::Error,
    },
    /// A file that is not a statistics file, or one of another model.
    #[error("statistics in {path}: {detail}", path = path.display())]
    Statistics {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        detail: String,
    },
    /// A file cannot be read or written.
    #[error("{path}: {source}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The user asked to stop.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

impl From<mqadapt_model::Error> for Error {
    fn from(error: mqadapt_model::Error) -> Self {
        match error {
            mqadapt_model::Error::Checkpoint(error) => Self::Checkpoint(error),
            mqadapt_model::Error::Interrupted(interrupted) => Self::Interrupted(interrupted),
            error => Self::Model(error),
        }
    }
}

impl Error {
    /// What a layer's merge says, as an error of the layer; for `map_err`.
    pub(crate) fn merge(layer_idx: usize) -> impl Fn(mqadapt_compress::Error) -> Self + Copy {
        move |source| match source {
            mqadapt_compress::Error::Interrupted(interrupted) => Self::Interrupted(interrupted),
            source => Self::Merge { layer_idx, source },
        }
    }
}
