//! A second thread that writes while the first one reads, computes and hashes what comes next.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::flusher::{Flusher, Task};
use crate::folder::destination::Destination;
use crate::resume::journal::{Journal, Mark};
use crate::{Error, Result, ShardRecord};

/// Buffers that are filled, wait, or are written. Few, so that what is read is still in the processor's cache when it is
/// written.
pub(crate) const BUFFERS: usize = 8;
/// How often a thread that waits for the other one looks up.
const LOOK_UP: Duration = Duration::from_millis(5);
/// How long a stopped conversion waits for the thread, which may be waiting for the flusher.
const PATIENCE: Duration = Duration::from_millis(100);
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

/// The thread, as the first one sees it.
pub(crate) struct Writer {
    messages: Option<Sender<Message>>,
    /// Buffers that were written and can be filled again.
    empty: Receiver<Vec<u8>>,
    thread: Option<JoinHandle<Result<Vec<ShardRecord>>>>,
    shared: Arc<Shared>,
}

/// What both threads look at.
#[derive(Default)]
struct Shared {
    stop: Arc<AtomicBool>,
    /// Bytes written since the thread was started.
    written: AtomicU64,
}

impl Writer {
    pub fn start(journal: Journal, sync: bool) -> Self {
        let (messages, received) = channel();
        let (emptied, empty) = channel();
        for _ in 0..BUFFERS {
            let _ = emptied.send(Vec::new()); // `empty` is there to receive it
        }
        let shared = Arc::new(Shared::default());
        let flusher = Flusher::start(journal, sync, Arc::clone(&shared.stop));
        let seen = Arc::clone(&shared);
        let thread = thread::spawn(move || write(&received, &emptied, &seen, flusher));
        Self { messages: Some(messages), empty, thread: Some(thread), shared }
    }

    /// A buffer of this length, its content arbitrary. Waits for one, telling `go_on` how many bytes are written meanwhile.
    pub fn buffer(&mut self, len: usize, mut go_on: impl FnMut(u64) -> Result<()>) -> Result<Vec<u8>> {
        loop {
            match self.empty.recv_timeout(LOOK_UP) {
                Ok(mut buffer) => {
                    buffer.resize(len, 0);
                    return Ok(buffer);
                }
                Err(RecvTimeoutError::Timeout) => go_on(self.written())?,
                // the thread only hangs up when it failed
                Err(RecvTimeoutError::Disconnected) => {
                    self.join()?;
                    return Ok(vec![0; len]);
                }
            }
        }
    }

    /// Bytes written so far.
    pub fn written(&self) -> u64 {
        self.shared.written.load(Ordering::Relaxed)
    }

    /// Has something done.
    pub fn send(&mut self, message: Message) -> Result<()> {
        let sent = self.messages.as_ref().is_some_and(|messages| messages.send(message).is_ok());
        // the thread only hangs up when it failed
        if sent { Ok(()) } else { self.join().map(|_| ()) }
    }

    /// Waits until everything is done, telling `go_on` how many bytes are written.
    pub fn finish(mut self, mut go_on: impl FnMut(u64) -> Result<()>) -> Result<Vec<ShardRecord>> {
        self.messages = None;
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            go_on(self.written())?;
            thread::sleep(LOOK_UP);
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

/// The thread's work. Returns the files completed, in order.
fn write(
    messages: &Receiver<Message>,
    emptied: &Sender<Vec<u8>>,
    shared: &Shared,
    mut flusher: Flusher,
) -> Result<Vec<ShardRecord>> {
    let mut current: Option<Destination> = None;
    for message in messages {
        if shared.stop.load(Ordering::Relaxed) {
            break;
        }
        match (message, &current) {
            (Message::Begin(destination), _) => {
                current = Some(destination.clone());
                flusher.send(Task::Begin(destination))?;
            }
            (Message::Data(bytes, offset), Some(to)) => {
                to.file.write_all_at(&bytes, offset).map_err(Error::io("write", &to.partial))?;
                shared.written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                let end = offset + bytes.len() as u64;
                if flusher.wants(end) {
                    flusher.send(Task::Written(end))?;
                }
                let _ = emptied.send(bytes); // nobody takes it when the first thread has stopped
            }
            (Message::Mark(mark), Some(_)) => flusher.send(Task::Mark(mark))?,
            (Message::Complete(mark), Some(_)) => {
                flusher.send(Task::Complete(mark))?;
                current = None;
            }
            (_, None) => {}
        }
    }
    flusher.finish()
}
