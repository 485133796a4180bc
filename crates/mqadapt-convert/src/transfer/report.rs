//! How far a transfer is.

use mqadapt_core::Progress;

use crate::Result;

/// The phase that progress is reported under; its unit is bytes written.
pub(crate) const PHASE: &str = "convert";

/// Progress of one conversion.
pub(super) struct Report<'a> {
    progress: &'a dyn Progress,
    total: u64,
    /// Bytes that an earlier run has written: those of complete shards, and of the others up to where this run continues.
    pub before: u64,
}

impl<'a> Report<'a> {
    pub fn new(progress: &'a dyn Progress, total: u64) -> Self {
        Self { progress, total, before: 0 }
    }

    /// Reports progress; `written` is what this run has written.
    pub fn report(&self, written: u64) -> Result<()> {
        Ok(self.progress.advance(PHASE, self.before + written, self.total)?)
    }
}
