//! The files that hold a checkpoint's tensors: local files, or remote ones that are fetched one at a time while they are needed.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::UNIX_EPOCH;

use xxhash_rust::xxh3::Xxh3;

use crate::file::{self, read_exact_at};
use crate::{Error, Result, TensorInfo};

/// Bytes of each tensor, at its beginning and at its end, that go into the fingerprint.
const SAMPLE: u64 = 512;

/// Lends the files of a checkpoint that is not here as a whole, because it is downloaded while it is converted.
///
/// A conversion asks for each shard once, in order, and returns it before it asks for the next (a method that needs whole
/// layers may ask again). A call may block; one that cannot go on returns an error, which ends the conversion.
pub trait ShardSource: Send + Sync + Debug {
    /// Makes a shard available and says where it is, complete.
    ///
    /// # Errors
    /// Why it cannot be had.
    fn acquire(&self, shard: &str) -> io::Result<PathBuf>;

    /// The shard is not needed any more.
    fn release(&self, shard: &str);
}

/// What is known of a shard before it is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardHead {
    /// Its file name, as in the index.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Its first bytes: the header with the 8 bytes before it (what follows is ignored).
    pub head: Vec<u8>,
    /// Changes whenever its content does: a checksum or an `ETag`.
    pub tag: String,
}

/// A file that holds tensors.
#[derive(Debug)]
pub struct Shard {
    name: String,
    path: PathBuf,
    len: u64,
    metadata: Option<Vec<(String, String)>>,
    tag: String,
    file: Mutex<Option<Arc<File>>>,
    source: Option<Arc<dyn ShardSource>>,
    /// Hash of its tensors' samples, once it is known.
    sample: OnceLock<String>,
}

impl Shard {
    /// A file that is there and stays.
    pub(crate) fn opened(
        name: String,
        path: PathBuf,
        len: u64,
        file: File,
        metadata: Option<Vec<(String, String)>>,
    ) -> Self {
        let (tag, file) = (tag(&file), Mutex::new(Some(Arc::new(file))));
        Self { name, path, len, metadata, tag, file, source: None, sample: OnceLock::new() }
    }

    /// A remote file, fetched when it is read.
    pub(crate) fn remote(
        head: ShardHead,
        folder: &Path,
        metadata: Option<Vec<(String, String)>>,
        source: Arc<dyn ShardSource>,
    ) -> Self {
        let (path, file, sample) = (folder.join(&head.name), Mutex::new(None), OnceLock::new());
        Self { name: head.name, path, len: head.bytes, metadata, tag: head.tag, file, source: Some(source), sample }
    }

    /// Its file name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is, if it is a file that stays.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// Changes when the file does: the time it was last written to, or what [`ShardHead::tag`] said.
    #[must_use]
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// `__metadata__` of its header, in the file's order.
    #[must_use]
    pub fn metadata(&self) -> Option<&[(String, String)]> {
        self.metadata.as_deref()
    }

    /// What is different about the file from when it was opened, in words; `None` if nothing is, or if it is remote.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn change(&self) -> Result<Option<String>> {
        if self.source.is_some() {
            return Ok(None);
        }
        let (file, len) = file::open_regular(&self.path)?;
        if len != self.len {
            return Ok(Some(format!("it had {} bytes and has {len} now", self.len)));
        }
        Ok((tag(&file) != self.tag).then(|| "it was written to".to_owned()))
    }

    /// The file, open for reading. A remote file that is not on the disk is fetched.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::RemoteShard`] when a fetched file does not have the length that was announced.
    pub fn file(&self) -> Result<Arc<File>> {
        let mut slot = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = &*slot {
            return Ok(Arc::clone(file));
        }
        let Some(source) = &self.source else { return Err(closed(&self.path)) };
        let path = source.acquire(&self.name).map_err(Error::io("fetch", &self.path))?;
        let (file, found) = file::open_regular(&path)?;
        if found != self.len {
            let (shard, expected) = (self.name.clone(), self.len);
            return Err(Error::RemoteShard { shard, expected, found });
        }
        Ok(Arc::clone(slot.insert(Arc::new(file))))
    }

    /// Closes a remote file and lets its source delete it. A local file stays open.
    pub fn release(&self) {
        if let Some(source) = &self.source
            && self.file.lock().unwrap_or_else(PoisonError::into_inner).take().is_some()
        {
            source.release(&self.name);
        }
    }

    /// Fills `out` with the file's bytes from `offset` on.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Shrunk`].
    pub fn read_exact_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        read_exact_at(&*self.file()?, &self.path, offset, out)
    }

    /// A hash of samples of these tensors, which must be all of this file's; computed once.
    pub(crate) fn sample<'a>(&self, tensors: impl Iterator<Item = &'a TensorInfo>) -> Result<&str> {
        if let Some(known) = self.sample.get() {
            return Ok(known);
        }
        let mut hash = Xxh3::new();
        let mut sample = [0; SAMPLE as usize];
        for tensor in tensors {
            let first = tensor.bytes.min(SAMPLE);
            let last = (tensor.bytes - first).min(SAMPLE);
            for (offset, len) in [(tensor.offset, first), (tensor.offset + tensor.bytes - last, last)] {
                let Some(sample) = sample.get_mut(..len as usize) else { continue };
                self.read_exact_at(offset, sample)?;
                hash.update(sample);
            }
        }
        Ok(self.sample.get_or_init(|| format!("{:032x}", hash.digest128())))
    }

    /// What [`Self::sample`] gave in an earlier process.
    pub(crate) fn remember_sample(&self, sample: &str) {
        let _ = self.sample.set(sample.to_owned()); // or it is known already
    }
}

/// The time of the last change, in nanoseconds.
fn tag(file: &File) -> String {
    let modified = file.metadata().and_then(|metadata| metadata.modified()).ok();
    let since = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map_or_else(String::new, |since| since.as_nanos().to_string())
}

fn closed(path: &Path) -> Error {
    Error::io("read", path)(io::Error::other("it was closed"))
}
