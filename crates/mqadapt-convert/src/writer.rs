//! A second thread that writes while the first one reads, computes and hashes what comes next. It also tells the disk to
//! begin, keeps the journal and completes files.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::journal::{Journal, Mark};
use crate::{Error, Result, ShardRecord, cache};

/// Messages that the first thread may be ahead.
pub(crate) const AHEAD: usize = 16;
/// How long the first thread sleeps when it is that far ahead: shorter than the writing of a message takes.
const NAP: Duration = Duration::from_micros(500);
/// How long a stopped conversion waits for the thread, which may be waiting for the disk.
const PATIENCE: Duration = Duration::from_millis(100);
/// Bytes of output after which the disk is told to begin with them.
const WRITE_BACK_EVERY: u64 = 256 << 20;
/// Bytes that the disk is waited for at once: a conversion that is stopped meanwhile ends soon.
const WAIT: u64 = 8 << 20;

/// What to do next.
pub(crate) enum Message {
    /// What follows belongs to this file.
    Begin(Destination),
    /// Write these bytes at this offset.
    Data(Vec<u8>, u64),
    /// A place to continue from.
    Mark(Mark),
    /// The file is complete.
    Complete(Mark),
}

/// A file that is being written.
pub(crate) struct Destination {
    pub file: Arc<File>,
    /// Its name while it is unfinished.
    pub partial: PathBuf,
    /// Its name afterwards.
    pub path: PathBuf,
}

/// The thread, as the first one sees it.
pub(crate) struct Writer {
    messages: Option<SyncSender<Message>>,
    /// Buffers that were written and can be filled again.
    empty: Receiver<Vec<u8>>,
    thread: Option<JoinHandle<Result<Vec<ShardRecord>>>>,
    shared: Arc<Shared>,
}

/// What both threads look at.
#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Bytes written since the thread was started.
    written: AtomicU64,
}

impl Writer {
    pub fn start(journal: Journal, sync: bool) -> Self {
        let (messages, received) = sync_channel(AHEAD);
        let (emptied, empty) = channel();
        let shared = Arc::new(Shared::default());
        let worker = Worker { journal, sync, shared: Arc::clone(&shared), completed: Vec::new(), emptied };
        let thread = thread::spawn(move || worker.run(&received));
        Self { messages: Some(messages), empty, thread: Some(thread), shared }
    }

    /// A buffer of this length, its content arbitrary.
    pub fn buffer(&self, len: usize) -> Vec<u8> {
        let mut buffer = self.empty.try_recv().unwrap_or_default();
        buffer.resize(len, 0);
        buffer
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// Has something done, telling `go_on` how many bytes are written until there is room for it.
    pub fn send(&mut self, mut message: Message, mut go_on: impl FnMut(u64) -> Result<()>) -> Result<()> {
        loop {
            go_on(self.written())?;
            let Some(messages) = &self.messages else { return Ok(()) };
            match messages.try_send(message) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Full(back)) => message = back,
                // the thread only hangs up when it failed
                Err(TrySendError::Disconnected(_)) => return self.join().map(|_| ()),
            }
            thread::sleep(NAP);
        }
    }

    /// Waits until everything is done, telling `go_on` how many bytes are written.
    pub fn finish(mut self, mut go_on: impl FnMut(u64) -> Result<()>) -> Result<Vec<ShardRecord>> {
        self.messages = None;
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            go_on(self.written())?;
            thread::sleep(10 * NAP);
        }
        let shards = self.join()?;
        go_on(self.written())?;
        Ok(shards)
    }

    fn join(&mut self) -> Result<Vec<ShardRecord>> {
        self.messages = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Ok(Vec::new()),
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.messages = None;
        let begun = Instant::now();
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) && begun.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

struct Worker {
    journal: Journal,
    sync: bool,
    shared: Arc<Shared>,
    completed: Vec<ShardRecord>,
    emptied: Sender<Vec<u8>>,
}

impl Worker {
    fn run(mut self, messages: &Receiver<Message>) -> Result<Vec<ShardRecord>> {
        let mut current: Option<Destination> = None;
        let mut flushed = 0; // bytes of the file whose way to the disk has begun
        for message in messages {
            if self.stopped() {
                break;
            }
            match (message, &current) {
                (Message::Begin(destination), _) => {
                    flushed = 0;
                    current = Some(destination);
                }
                (Message::Data(bytes, offset), Some(to)) => {
                    to.file.write_all_at(&bytes, offset).map_err(Error::io("write", &to.partial))?;
                    self.shared.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    let end = offset + bytes.len() as u64;
                    let _ = self.emptied.send(bytes); // nobody takes it when the first thread has stopped
                    if self.sync && end - flushed >= WRITE_BACK_EVERY {
                        cache::begin_write_back(&to.file, flushed, end);
                        cache::forget(&to.file, 0, flushed); // what is not on the disk yet stays
                        flushed = end;
                    }
                }
                (Message::Mark(mark), Some(_)) => self.journal.mark(&mark)?,
                (Message::Complete(mark), Some(to)) => {
                    self.complete(to, &mark)?;
                    current = None;
                }
                (_, None) => {}
            }
        }
        Ok(self.completed)
    }

    fn complete(&mut self, to: &Destination, mark: &Mark) -> Result<()> {
        if self.sync {
            let mut start = 0;
            while start < mark.bytes && !self.stopped() {
                let end = mark.bytes.min(start + WAIT);
                cache::wait_for_disk(&to.file, start, end).map_err(Error::io("write", &to.partial))?;
                start = end;
            }
        }
        if self.stopped() {
            return Ok(());
        }
        if self.sync {
            to.file.sync_all().map_err(Error::io("write", &to.partial))?;
            cache::forget(&to.file, 0, mark.bytes);
        }
        fs::rename(&to.partial, &to.path).map_err(Error::io("rename", &to.partial))?;
        self.journal.mark(mark)?;
        self.completed.push(mark.record());
        Ok(())
    }

    fn stopped(&self) -> bool {
        self.shared.stop.load(Ordering::Relaxed)
    }
}
