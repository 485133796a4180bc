//! A third thread that flushes files to the disk while the next bytes are written: it has the system write dirty pages back,
//! keeps the journal, and completes files.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};

use crate::folder::destination::Destination;
use crate::folder::directory::partial;
use crate::folder::page_cache;
use crate::resume::journal::{Journal, Mark};
use crate::{Error, Result, ShardRecord};

/// Bytes of output after which their way to the disk begins.
const WRITE_BACK_EVERY: u64 = 16 << 20;
/// Bytes that are on their way before the oldest are waited for; then those leave the page cache. Enough to keep a disk busy,
/// and few: a file cannot be removed before the disk has what is on its way to it.
const ON_THE_WAY: u64 = 64 << 20;
/// Bytes that are waited for at once: a conversion that is stopped meanwhile ends soon.
const WAIT: u64 = 8 << 20;

/// What to do next.
pub(crate) enum Task {
    /// What follows belongs to this file.
    Begin(Destination),
    /// Reports the file's new length in bytes.
    Written(u64),
    /// A place to continue from.
    Mark(Mark),
    /// The file is complete.
    Complete(Mark),
}

/// The thread, as the one that writes sees it.
pub(crate) struct Flusher {
    tasks: Option<Sender<Task>>,
    thread: Option<JoinHandle<Result<Vec<ShardRecord>>>>,
    sync: bool,
    /// Bytes of the file that the thread was told of.
    told: u64,
}

impl Flusher {
    /// Without `sync`, files are completed without waiting for the disk.
    pub fn start(journal: Journal, sync: bool, stop: Arc<AtomicBool>) -> Self {
        let (tasks, received) = channel();
        let worker = Worker { journal, sync, stop, completed: Vec::new(), begun: 0, there: 0 };
        Self { tasks: Some(tasks), thread: Some(thread::spawn(move || worker.run(&received))), sync, told: 0 }
    }

    /// Whether to report the file's length: waking a thread costs more than writing a buffer.
    pub fn wants(&self, written: u64) -> bool {
        self.sync && written >= self.told + WRITE_BACK_EVERY
    }

    /// Has something done after what was sent before.
    pub fn send(&mut self, task: Task) -> Result<()> {
        match task {
            Task::Begin(_) => self.told = 0,
            Task::Written(bytes) => self.told = bytes,
            Task::Mark(_) | Task::Complete(_) => {}
        }
        let sent = self.tasks.as_ref().is_some_and(|tasks| tasks.send(task).is_ok());
        // the thread only hangs up when it failed
        if sent { Ok(()) } else { self.finish().map(|_| ()) }
    }

    /// Waits until everything is done. The files completed, in order.
    pub fn finish(&mut self) -> Result<Vec<ShardRecord>> {
        self.tasks = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(Vec::new()),
        }
    }
}

struct Worker {
    journal: Journal,
    sync: bool,
    stop: Arc<AtomicBool>,
    completed: Vec<ShardRecord>,
    /// Bytes of the file whose way to the disk has begun.
    begun: u64,
    /// Bytes of the file that were waited for.
    there: u64,
}

impl Worker {
    fn run(mut self, tasks: &Receiver<Task>) -> Result<Vec<ShardRecord>> {
        let mut current: Option<Destination> = None;
        for task in tasks {
            if self.stopped() {
                break;
            }
            match (task, &current) {
                (Task::Begin(destination), _) => {
                    (self.begun, self.there) = (0, 0);
                    current = Some(destination);
                }
                (Task::Written(bytes), Some(to)) => {
                    self.write_back(to, bytes);
                    self.wait(to, bytes.saturating_sub(ON_THE_WAY))?;
                }
                (Task::Mark(mark), Some(_)) => self.journal.mark(&mark)?,
                (Task::Complete(mark), Some(to)) => {
                    self.complete(to, &mark)?;
                    current = None;
                }
                (_, None) => {}
            }
        }
        Ok(self.completed)
    }

    /// Begins to write back up to here.
    fn write_back(&mut self, to: &Destination, end: u64) {
        while self.begun < end && !self.stopped() {
            let next = end.min(self.begun + WRITE_BACK_EVERY);
            page_cache::begin_write_back(&to.file, self.begun, next);
            self.begun = next;
        }
    }

    /// Waits for what is on its way up to here, and drops it from the page cache.
    fn wait(&mut self, to: &Destination, end: u64) -> Result<()> {
        while self.there < end && !self.stopped() {
            let next = end.min(self.there + WAIT);
            page_cache::wait_for_disk(&to.file, self.there, next).map_err(Error::io("write", &to.partial))?;
            page_cache::forget(&to.file, self.there, next);
            self.there = next;
        }
        Ok(())
    }

    fn complete(&mut self, to: &Destination, mark: &Mark) -> Result<()> {
        if self.sync {
            self.write_back(to, mark.bytes);
            self.wait(to, mark.bytes)?;
        }
        if self.stopped() {
            return Ok(());
        }
        if self.sync {
            to.file.sync_all().map_err(Error::io("write", &to.partial))?;
        }
        to.folder.rename(&partial(&to.name), &to.name)?;
        self.journal.mark(mark)?;
        self.completed.push(mark.record());
        Ok(())
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}
