//! Weight files that `mqadapt_rs.sources.download.Shards` downloads one at a time, when they are read.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mqadapt_checkpoint::{Checkpoint, ShardHead, ShardSource};
use pyo3::prelude::*;

use crate::errors::OrRaise;

/// The Python object that downloads and deletes weight files.
#[derive(Debug)]
pub(crate) struct Shards(Py<PyAny>);

impl ShardSource for Shards {
    fn acquire(&self, shard: &str) -> io::Result<PathBuf> {
        Python::attach(|py| self.0.bind(py).call_method1("acquire", (shard,))?.extract())
            .map_err(|error: PyErr| io::Error::other(Python::attach(|py| error.value(py).to_string())))
    }

    fn release(&self, shard: &str) {
        // a file that cannot be removed is removed with its folder, or left with it
        let _ = Python::attach(|py| self.0.call_method1(py, "release", (shard,)));
    }
}

impl Shards {
    /// Opens a checkpoint of the hub. Its weight files are downloaded when they are read.
    pub(crate) fn open(src: &Bound<'_, PyAny>, dst: &Path) -> PyResult<(Checkpoint, Arc<Self>)> {
        let py = src.py();
        Self::checkpoint(py.import("mqadapt_rs.sources.download")?.call_method1("Shards", (src, dst))?)
    }

    /// Opens a checkpoint of the hub from its headers alone, for `inspect`; `None` if its weights are in the cache.
    pub(crate) fn headers(src: &Bound<'_, PyAny>) -> PyResult<Option<Checkpoint>> {
        let shards = src.py().import("mqadapt_rs.sources.download")?.call_method1("headers", (src,))?;
        if shards.is_none() { Ok(None) } else { Ok(Some(Self::checkpoint(shards)?.0)) }
    }

    fn checkpoint(shards: Bound<'_, PyAny>) -> PyResult<(Checkpoint, Arc<Self>)> {
        let py = shards.py();
        let folder: PathBuf = shards.getattr("folder")?.extract()?;
        let heads: Vec<(String, u64, Vec<u8>, String)> = shards.getattr("heads")?.extract()?;
        let heads = heads.into_iter().map(|(name, bytes, head, tag)| ShardHead { name, bytes, head, tag }).collect();
        let shards = Arc::new(Self(shards.unbind()));
        let source: Arc<dyn ShardSource> = Arc::clone(&shards) as _;
        let checkpoint = py.detach(|| Checkpoint::open_remote(&folder, heads, &source)).or_raise()?;
        Ok((checkpoint, shards))
    }

    /// Ends a download that is under way.
    pub(crate) fn stop(&self, py: Python<'_>) {
        let _ = self.0.call_method0(py, "stop");
    }

    /// Removes what was downloaded, unless the next attempt needs it.
    pub(crate) fn close(&self, py: Python<'_>, keep: bool) -> PyResult<()> {
        self.0.call_method1(py, "close", (keep,)).map(drop)
    }
}
