//! Weight files lent by `mqadapt_rs.sources.download.Shards`, which downloads them one at a time.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mqadapt_checkpoint::{Checkpoint, ShardHead, ShardSource};
use pyo3::prelude::*;

use crate::errors::OrRaise;

/// The Python object that lends.
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
    /// A checkpoint of the hub whose weight files come when they are needed, and who brings them.
    pub(crate) fn open(src: &Bound<'_, PyAny>, dst: &Path) -> PyResult<(Checkpoint, Arc<Self>)> {
        let py = src.py();
        Self::lend(py.import("mqadapt_rs.sources.download")?.call_method1("Shards", (src, dst))?)
    }

    /// A checkpoint of the hub of which only the headers are fetched, to be looked at; `None` if its weights are here.
    pub(crate) fn headers(src: &Bound<'_, PyAny>) -> PyResult<Option<Checkpoint>> {
        let shards = src.py().import("mqadapt_rs.sources.download")?.call_method1("headers", (src,))?;
        if shards.is_none() { Ok(None) } else { Ok(Some(Self::lend(shards)?.0)) }
    }

    fn lend(shards: Bound<'_, PyAny>) -> PyResult<(Checkpoint, Arc<Self>)> {
        let py = shards.py();
        let folder: PathBuf = shards.getattr("folder")?.extract()?;
        let heads: Vec<(String, u64, Vec<u8>, String)> = shards.getattr("heads")?.extract()?;
        let heads = heads.into_iter().map(|(name, bytes, head, tag)| ShardHead { name, bytes, head, tag }).collect();
        let shards = Arc::new(Self(shards.unbind()));
        let lender: Arc<dyn ShardSource> = Arc::clone(&shards) as _;
        let checkpoint = py.detach(|| Checkpoint::open_lent(&folder, heads, &lender)).or_raise()?;
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
