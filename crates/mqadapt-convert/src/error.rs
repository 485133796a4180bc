//! What can go wrong in a conversion.

use std::io;
use std::path::{Path, PathBuf};

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a conversion or a verification ended. Every message says where, what was expected and what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The source cannot be read or is not what it should be.
    #[error(transparent)]
    Checkpoint(#[from] mqadapt_checkpoint::Error),
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
    /// The output folder is there already.
    #[error("{}: exists already; choose another folder, or pass --overwrite to replace it", .path.display())]
    Exists {
        /// The output folder.
        path: PathBuf,
    },
    /// The output folder has no name of its own.
    #[error("the output path '{}' does not name a folder (is a variable unset?); give the folder to write", .path.display())]
    Unnamed {
        /// What was given.
        path: PathBuf,
    },
    /// What would be overwritten is not only what a conversion wrote.
    #[error("{}: {detail}, so it is not overwritten; move that away, or give another folder", .path.display())]
    NotReplaceable {
        /// The output folder.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// Something appeared, or changed, under the output's name while the conversion ran.
    #[error(
        "{}: {what} while the conversion ran, and stays as it is; the converted checkpoint is complete in {}: move the \
         former away and convert again with --resume, which finishes it",
        .path.display(), .work.display()
    )]
    Appeared {
        /// The output folder.
        path: PathBuf,
        /// What happened to it.
        what: String,
        /// Where the result is.
        work: PathBuf,
    },
    /// The replaced folder got files while it was removed.
    #[error("{}: is converted; what was there before is in {}, because {names} appeared in it: move that away", .path.display(), .old.display())]
    LeftOver {
        /// The output folder.
        path: PathBuf,
        /// Where the replaced one is.
        old: PathBuf,
        /// What is in it.
        names: String,
    },
    /// The working folder, or a file in it, is not this conversion's own.
    #[error("{}: {detail}; nothing is written there: remove it yourself, or give another output folder", .path.display())]
    Foreign {
        /// The folder or file.
        path: PathBuf,
        /// Why it is not.
        detail: String,
    },
    /// The journal of an unfinished conversion says nothing that can be believed.
    #[error("{}: {detail}; --overwrite starts again", .path.display())]
    Journal {
        /// The journal.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// The output would replace the source.
    #[error("{}: the output folder is the source, or holds it; a conversion is never in place: give another folder", .path.display())]
    InPlace {
        /// The output folder.
        path: PathBuf,
    },
    /// An earlier conversion into this folder was killed.
    #[error("{}: holds an unfinished conversion; --resume continues it, --overwrite starts again", .path.display())]
    Unfinished {
        /// Its folder.
        path: PathBuf,
    },
    /// The unfinished conversion is of another kind.
    #[error("{}: holds another unfinished conversion ({difference}); --overwrite starts again", .path.display())]
    OtherConversion {
        /// Its folder.
        path: PathBuf,
        /// What differs.
        difference: String,
    },
    /// Another process converts into this folder.
    #[error("{}: another process is converting into this folder; wait for it or give another folder", .path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
    },
    /// The disk is too small.
    #[error("{}: the converted checkpoint needs {needed} bytes, but only {available} are free there", .path.display())]
    NoSpace {
        /// The folder.
        path: PathBuf,
        /// Bytes to be written.
        needed: u64,
        /// Bytes free.
        available: u64,
    },
    /// The source was changed during the conversion.
    #[error("{}: was changed while it was converted ({detail}); convert it again", .path.display())]
    SourceChanged {
        /// The file.
        path: PathBuf,
        /// What changed.
        detail: String,
    },
    /// Finite values became infinite in the dtype asked for.
    #[error(
        "tensor '{name}': {count} finite values are too large for {dtype}; choose another --dtype (the largest float16 is 65504)"
    )]
    Overflow {
        /// The first tensor where it happened.
        name: String,
        /// The dtype asked for.
        dtype: &'static str,
        /// How many of its values.
        count: u64,
    },
    /// The method cannot do this.
    #[error("method '{method}': {detail}")]
    Method {
        /// The method.
        method: String,
        /// Why not.
        detail: String,
    },
    /// `mqadapt.json` is malformed or says something impossible.
    #[error("{}: {detail}", .path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        detail: String,
    },
    /// The target cannot hold what the plan asks for.
    #[error("target '{target}' {detail}")]
    Target {
        /// The target.
        target: &'static str,
        /// What it can hold.
        detail: String,
    },
    /// The user stopped it.
    #[error(transparent)]
    Interrupted(#[from] mqadapt_core::Interrupted),
}

impl Error {
    /// For `map_err` on an I/O operation.
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { action, path, source: source.into() }
    }
}
