//! Where the bytes of a file go while it is unfinished.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use super::directory::Directory;

/// A file that is being written.
#[derive(Clone)]
pub(crate) struct Destination {
    pub file: Arc<File>,
    pub folder: Arc<Directory>,
    /// Its path while it is unfinished.
    pub partial: PathBuf,
    /// Its name in the folder afterwards.
    pub name: String,
}
