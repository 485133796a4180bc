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

/// How far work is that consists of steps, for the checks within a step.
#[derive(Clone, Copy)]
pub struct Progressing<'a> {
    /// Who is told.
    pub progress: &'a dyn Progress,
    /// As [`Progress::advance`] takes it.
    pub phase: &'static str,
    /// Steps that are finished.
    pub done: u64,
    /// Steps in all.
    pub total: u64,
}

impl Progressing<'_> {
    /// Nobody is told, nothing is interrupted.
    pub const UNWATCHED: Progressing<'static> = Progressing { progress: &NoProgress, phase: "", done: 0, total: 1 };

    /// Says where the work is: the place where it is interrupted.
    ///
    /// # Errors
    /// [`Interrupted`].
    pub fn tell(&self) -> Result<(), Interrupted> {
        self.progress.advance(self.phase, self.done, self.total)
    }
}

/// Work within a step: of its own progress nobody is told, but it is interrupted.
impl Progress for Progressing<'_> {
    fn advance(&self, _phase: &str, _done: u64, _total: u64) -> Result<(), Interrupted> {
        self.tell()
    }
}

/// Nobody watches, nobody interrupts.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoProgress;

impl Progress for NoProgress {
    fn advance(&self, _phase: &str, _done: u64, _total: u64) -> Result<(), Interrupted> {
        Ok(())
    }
}
