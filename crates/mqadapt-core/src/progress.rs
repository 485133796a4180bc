//! How long work says how far it is, and how it is told to stop.

/// The user asked to stop (Ctrl-C), or a progress callback failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// Receives progress from long work. Called often (at least every 0.1 s of work), so an implementation throttles itself.
pub trait Progress: Sync {
    /// `done` of `total` units of `phase` are finished (bytes, tokens or requests, as the caller documents).
    ///
    /// # Errors
    /// [`Interrupted`] stops the work at once.
    fn advance(&self, phase: &str, done: u64, total: u64) -> Result<(), Interrupted>;
}

/// Nobody watches, nobody interrupts.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn advance(&self, _phase: &str, _done: u64, _total: u64) -> Result<(), Interrupted> {
        Ok(())
    }
}
