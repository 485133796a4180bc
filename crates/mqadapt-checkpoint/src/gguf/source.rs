//! Where a GGUF file's bytes come from: a file, or memory in tests and fuzzing.

use std::path::PathBuf;

use crate::{Error, Result, Shard};

/// Random access without a shared position, so that threads can read one file.
pub(crate) trait Source {
    /// Bytes in all.
    fn bytes(&self) -> u64;
    /// Fills `out` from `offset` on.
    fn read_exact_at(&self, offset: u64, out: &mut [u8]) -> Result<()>;
}

impl Source for Shard {
    fn bytes(&self) -> u64 {
        Self::bytes(self)
    }

    fn read_exact_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        Self::read_exact_at(self, offset, out)
    }
}

impl Source for &[u8] {
    fn bytes(&self) -> u64 {
        self.len() as u64
    }

    fn read_exact_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = start.checked_add(out.len()).and_then(|end| self.get(start..end));
        let shrunk = || Error::Shrunk { path: PathBuf::from("memory"), at: self.len() as u64 };
        out.copy_from_slice(bytes.ok_or_else(shrunk)?);
        Ok(())
    }
}
