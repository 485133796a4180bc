//! What can be wrong with a checkpoint.

use std::io;
use std::path::{Path, PathBuf};

use mqadapt_core::family::{LayerTensor, Module};

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// What is wrong with a checkpoint. Every message says where, what was expected and what was found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {action} {}: {source}", .path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A weight is infinite or not a number, and a merge or a pass over text needs it.
    #[error(
        "{}: tensor '{name}' holds {value} at {at:?}; heads are merged and layers run from finite values only: get an \
         intact copy of the model{}", .path.display(), or_keep(.name)
    )]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// `NaN`, `inf` or `-inf`.
        value: f32,
        /// Index of the first such value, outermost dimension first.
        at: Vec<usize>,
    },
    /// There is no such file or folder, or it is not a checkpoint.
    #[error("{}: {detail}", .path.display())]
    NotACheckpoint {
        /// What was given.
        path: PathBuf,
        /// What was expected there.
        detail: String,
    },
    /// `config.json` or a plan is wrong.
    #[error("{}: {source}", .path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: mqadapt_core::Error,
    },
    /// The plan does not fit the model, or cannot be read.
    #[error(transparent)]
    Plan(mqadapt_core::Error),
    /// The header of a safetensors file is malformed.
    #[error("{}: not a valid safetensors file: {problem}", .path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: HeaderProblem,
    },
    /// `model.safetensors.index.json` is malformed.
    #[error("{}: {detail}", .path.display())]
    Index {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        detail: String,
    },
    /// A shard that the index names is not there.
    #[error("{}: the index names the shard '{shard}', which is not in the folder; download it again", .folder.display())]
    MissingShard {
        /// The checkpoint.
        folder: PathBuf,
        /// The file name.
        shard: String,
    },
    /// The index and the shards' headers disagree.
    #[error("{}: tensor '{name}': {detail}", .path.display())]
    Misplaced {
        /// The index, or the shard.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What each of them says.
        detail: String,
    },
    /// A tensor that the model needs is not there.
    #[error("{}: tensor '{name}' {expected:?} is missing; config.json says that the model has it", .path.display())]
    MissingTensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its shape.
        expected: Vec<usize>,
    },
    /// A tensor has another shape than `config.json` says.
    #[error("{}: tensor '{name}' has shape {found:?}, but config.json says {expected:?}", .path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// From the configuration.
        expected: Vec<usize>,
        /// In the file.
        found: Vec<usize>,
    },
    /// A weight is stored as something that is not a supported float.
    #[error("{}: tensor '{name}' is stored as {found}; supported are F64, F32, F16 and BF16", .path.display())]
    Dtype {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// The stored type.
        found: String,
    },
    /// A file ended before the data that its header promised: it was changed while it was read.
    #[error("{}: the file ends at byte {at}, inside data that its header promises; it was changed or truncated while it was read", .path.display())]
    Shrunk {
        /// The file.
        path: PathBuf,
        /// Where it ends.
        at: u64,
    },
    /// A fetched shard does not have the length that was announced.
    #[error("'{shard}' has {found} bytes, expected {expected}; it is truncated, or was changed")]
    RemoteShard {
        /// Its name.
        shard: String,
        /// The length announced.
        expected: u64,
        /// Its length.
        found: u64,
    },
    /// A piece was asked for that the tensor does not have.
    #[error("tensor '{name}' has {len} values; {count} from value {first} were requested")]
    OutOfRange {
        /// The tensor.
        name: String,
        /// Its number of values.
        len: u64,
        /// First value asked for.
        first: usize,
        /// How many.
        count: usize,
    },
    /// A GGUF file is malformed, or has something that is not supported.
    #[error("{}: {detail}", .path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        detail: String,
    },
}

impl Error {
    /// For `map_err` on an I/O operation.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source }
    }
}

/// What helps beside an intact copy, where the tensor belongs to a layer's attention.
fn or_keep(name: &str) -> String {
    match LayerTensor::parse(name) {
        Some(LayerTensor {
            layer_idx, module: Module::QProj | Module::KProj | Module::VProj | Module::OProj, ..
        }) => {
            format!(", or a plan that leaves layer {layer_idx} as it is")
        }
        _ => String::new(),
    }
}

/// What is wrong with the header of a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderProblem {
    /// Shorter than the 8 bytes that give the header's length.
    #[error("it has {len} bytes, and the header's length alone takes 8")]
    TooShort {
        /// Length of the file.
        len: u64,
    },
    /// The header is longer than any honest one.
    #[error("its header claims {len} bytes; the limit is {max}")]
    TooLong {
        /// Length claimed.
        len: u64,
        /// The limit.
        max: u64,
    },
    /// The header goes on after the end of the file.
    #[error("its header claims {claimed} bytes, but only {found} follow")]
    Truncated {
        /// Length claimed.
        claimed: u64,
        /// Bytes in the file after the length.
        found: u64,
    },
    /// Not JSON of the right form (a name that is not UTF-8, a duplicate key, an unknown dtype, a negative number, ...).
    #[error("its header is malformed: {detail}")]
    Syntax {
        /// What the parser found, and where.
        detail: String,
    },
    /// A name occurs twice.
    #[error("its header has '{name}' twice")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A shape whose size cannot be computed.
    #[error("tensor '{name}' has a shape that overflows: {shape:?}")]
    Overflow {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<usize>,
    },
    /// The offsets do not fit shape and dtype.
    #[error("tensor '{name}' needs {expected} bytes by shape and dtype, but its offsets are {start} to {end}")]
    Size {
        /// The tensor.
        name: String,
        /// By shape and dtype.
        expected: u64,
        /// First offset.
        start: u64,
        /// Last offset.
        end: u64,
    },
    /// Tensors overlap, or there is a hole between them.
    #[error("tensor '{name}' starts at offset {start}, but the one before it ends at {expected}")]
    NotContiguous {
        /// The tensor.
        name: String,
        /// Its start.
        start: u64,
        /// Where it should start.
        expected: u64,
    },
    /// The data does not fill the file exactly.
    #[error("its tensors need {expected} bytes of data, but the file has {found}")]
    Length {
        /// By the header.
        expected: u64,
        /// In the file.
        found: u64,
    },
}
