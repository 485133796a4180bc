//! Long work: off the GIL, with progress, and stopped by Ctrl-C.
//!
//! The work runs on a thread of its own while the calling thread waits. Python delivers signals to its main thread
//! only, and a callback belongs to the thread that made the call: so it is the waiting thread that asks for signals and
//! calls back, and the work sees no more of it than a flag.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::{Duration, Instant};

use mqadapt_core::{Interrupted, Progress};
use pyo3::prelude::*;

use crate::errors::{IntoPyErr, failure, io};

/// How often signals are looked for, and how often the callback is called at most.
const TICK: Duration = Duration::from_millis(50);

#[derive(Default)]
struct State {
    phase: String,
    done: u64,
    total: u64,
    /// Not yet passed on to the callback.
    fresh: bool,
    /// The end of a phase, for which the work waits until it was passed on.
    urgent: bool,
    finished: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    stop: AtomicBool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was reported has been passed on.
    fn let_go(&self) {
        self.lock().urgent = false;
        self.changed.notify_all();
    }
}

impl Progress for Shared {
    fn advance(&self, phase: &str, done: u64, total: u64) -> Result<(), Interrupted> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Interrupted);
        }
        let mut state = self.lock();
        phase.clone_into(&mut state.phase);
        (state.done, state.total, state.fresh) = (done, total, true);
        if done < total {
            return Ok(());
        }
        // what stops the work stops it before it goes on to its next step, such as putting its result in place
        state.urgent = true;
        self.changed.notify_all();
        let waits = |state: &mut State| state.urgent && !self.stop.load(Ordering::Relaxed);
        drop(self.changed.wait_while(state, waits).unwrap_or_else(PoisonError::into_inner));
        if self.stop.load(Ordering::Relaxed) { Err(Interrupted) } else { Ok(()) }
    }
}

/// Wakes the waiting thread when the work ends, also by a panic.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        self.0.lock().finished = true;
        self.0.changed.notify_all();
    }
}

/// Runs `work` without the GIL. `callback`, if not `None`, is called as `callback(phase, done, total)` about twenty times
/// a second. A signal (Ctrl-C) or an exception in the callback stops the work and is raised once it has stopped.
pub(crate) fn run<T, E>(
    py: Python<'_>,
    callback: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce(&dyn Progress) -> Result<T, E> + Send,
) -> PyResult<T>
where
    T: Send,
    E: IntoPyErr + Send,
{
    run_or(py, callback, |_| (), work)
}

/// As [`run`]; `stopped` is called when the work is to stop, to wake it where it waits for something else.
pub(crate) fn run_or<T, E>(
    py: Python<'_>,
    callback: Option<&Bound<'_, PyAny>>,
    stopped: impl FnOnce(Python<'_>),
    work: impl FnOnce(&dyn Progress) -> Result<T, E> + Send,
) -> PyResult<T>
where
    T: Send,
    E: IntoPyErr + Send,
{
    let shared = Shared::default();
    let (outcome, raised) = std::thread::scope(|scope| {
        let spawned = Builder::new().spawn_scoped(scope, || {
            let _finish = Finish(&shared);
            work(&shared)
        });
        let worker = match spawned {
            Ok(worker) => worker,
            Err(error) => return (None, Some(io(&format!("cannot start a thread for the work: {error}"), &error))),
        };
        let raised = wait(py, &shared, callback).err();
        if raised.is_some() {
            shared.stop.store(true, Ordering::Relaxed);
            stopped(py);
        }
        shared.let_go();
        // the work has ended, or ends as soon as it next reports progress
        let outcome = py.detach(|| worker.join());
        (Some(outcome), raised)
    });
    match (outcome, raised) {
        (Some(Err(panic)), _) => std::panic::resume_unwind(panic),
        (_, Some(raised)) => Err(raised),
        (Some(Ok(outcome)), None) => outcome.map_err(IntoPyErr::into_py_err),
        (None, None) => Err(failure("the work was not done")),
    }
}

thread_local! {
    /// The model whose callback this thread runs.
    static CALLED_BY: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Calls back while a model waits for the answer.
pub(crate) fn as_callback_of<T>(model: usize, callback: impl FnOnce() -> T) -> T {
    let before = CALLED_BY.replace(Some(model));
    let answer = callback();
    CALLED_BY.set(before);
    answer
}

/// Refuses a call from within a callback of the model: each would wait for the other.
pub(crate) fn not_in_callback_of(model: usize) -> PyResult<()> {
    if CALLED_BY.get() == Some(model) {
        return Err(failure(
            "the model is generating: a callback cannot call it; load a second model, or use the tokens afterwards",
        ));
    }
    Ok(())
}

/// Until the work ends: looks for signals and passes progress on.
fn wait(py: Python<'_>, shared: &Shared, callback: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
    let mut tick = Instant::now() + TICK;
    loop {
        let finished = py.detach(|| {
            let state = shared.lock();
            let left = tick.saturating_duration_since(Instant::now());
            let waited = shared.changed.wait_timeout_while(state, left, |state| !state.finished && !state.urgent);
            waited.unwrap_or_else(PoisonError::into_inner).0.finished
        });
        py.check_signals()?;
        let news = {
            let mut state = shared.lock();
            let fresh = std::mem::replace(&mut state.fresh, false);
            fresh.then(|| (state.phase.clone(), state.done, state.total))
        };
        if let (Some(callback), Some(news)) = (callback, news) {
            callback.call1(news)?;
        }
        shared.let_go();
        if finished {
            return Ok(());
        }
        tick = Instant::now() + TICK;
    }
}
