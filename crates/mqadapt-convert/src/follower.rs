//! A second thread that follows the first: it writes and hashes what that one computed, hashes what that one had the kernel
//! copy while it is still in the page cache, tells the disk to begin, keeps the journal, and completes files. The first
//! thread meanwhile reads the next bytes.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use xxhash_rust::xxh3::Xxh3;

use crate::journal::{Journal, Learnt, Mark};
use crate::transfer::write_all_at;
use crate::{Error, Result, ShardRecord, cache};

/// Bytes hashed at a time: they stay in the second-level cache between the copy out of the kernel and the hash.
const PIECE: usize = 256 << 10;
/// Messages that the first thread may be ahead.
const AHEAD: usize = 8;
/// How long a stopped conversion waits for the thread, which may be waiting for the disk.
const PATIENCE: Duration = Duration::from_millis(100);

/// A file that is being written.
pub(crate) struct Following {
    pub name: String,
    pub file: Arc<File>,
    /// Its name while it is unfinished.
    pub partial: PathBuf,
    /// Its name afterwards.
    pub path: PathBuf,
    /// Bytes hashed before.
    pub hashed: u64,
    pub hash: Box<Xxh3>,
}

enum Message {
    Begin(Following),
    /// To be written where what came before ends.
    Data(Vec<u8>),
    /// The first so many bytes of the file are there.
    Written(u64),
    /// A place to continue from.
    Mark(Learnt),
    /// The file is complete.
    Complete(Learnt),
}

/// The thread, as the writer sees it.
pub(crate) struct Follower {
    messages: Option<SyncSender<Message>>,
    /// Buffers that were written and can be filled again.
    empty: Receiver<Vec<u8>>,
    thread: Option<JoinHandle<Result<Vec<ShardRecord>>>>,
    stop: Arc<AtomicBool>,
}

impl Follower {
    pub fn start(journal: Journal, sync: bool) -> Self {
        let (messages, received) = sync_channel(AHEAD);
        let (emptied, empty) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread =
            thread::spawn(move || Worker { journal, sync, stop: seen, completed: Vec::new(), emptied }.run(&received));
        Self { messages: Some(messages), empty, thread: Some(thread), stop }
    }

    pub fn begin(&mut self, following: Following) -> Result<()> {
        self.send(Message::Begin(following))
    }

    /// A buffer of this length, its content arbitrary.
    pub fn buffer(&self, len: usize) -> Vec<u8> {
        let mut buffer = self.empty.try_recv().unwrap_or_default();
        buffer.resize(len, 0);
        buffer
    }

    /// Writes a buffer where what came before ends.
    pub fn data(&mut self, bytes: Vec<u8>) -> Result<()> {
        self.send(Message::Data(bytes))
    }

    pub fn written(&mut self, bytes: u64) -> Result<()> {
        self.send(Message::Written(bytes))
    }

    pub fn mark(&mut self, learnt: Learnt) -> Result<()> {
        self.send(Message::Mark(learnt))
    }

    pub fn complete(&mut self, learnt: Learnt) -> Result<()> {
        self.send(Message::Complete(learnt))
    }

    /// Waits until everything is done, asking `interrupted` ten times a second whether to go on.
    pub fn finish(mut self, mut interrupted: impl FnMut() -> Result<()>) -> Result<Vec<ShardRecord>> {
        self.messages = None;
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            interrupted()?;
            thread::sleep(Duration::from_millis(5));
        }
        self.join()
    }

    fn send(&mut self, message: Message) -> Result<()> {
        let sent = self.messages.as_ref().is_some_and(|messages| messages.send(message).is_ok());
        // the thread only hangs up when it failed
        if sent { Ok(()) } else { self.join().map(|_| ()) }
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

impl Drop for Follower {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
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
    stop: Arc<AtomicBool>,
    completed: Vec<ShardRecord>,
    emptied: Sender<Vec<u8>>,
}

impl Worker {
    fn run(mut self, messages: &Receiver<Message>) -> Result<Vec<ShardRecord>> {
        let mut current: Option<Following> = None;
        let mut flushed = 0; // bytes whose writing has begun
        let mut piece = vec![0; PIECE];
        for message in messages {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            match (message, &mut current) {
                (Message::Begin(following), _) => {
                    flushed = following.hashed;
                    current = Some(following);
                }
                (Message::Data(bytes), Some(following)) => {
                    write_all_at(&following.file, &following.partial, following.hashed, &bytes)?;
                    following.hash.update(&bytes);
                    following.hashed += bytes.len() as u64;
                    let _ = self.emptied.send(bytes); // nobody takes it when the first thread has stopped
                }
                (Message::Written(bytes), Some(following)) => following.follow(bytes, &mut piece, &self.stop)?,
                (Message::Mark(learnt), Some(following)) => {
                    if self.sync {
                        cache::write_back(&following.file, flushed, following.hashed);
                        flushed = following.hashed;
                    }
                    self.journal.mark(&following.mark(learnt, false))?;
                }
                (Message::Complete(learnt), Some(following)) => {
                    self.complete(following, learnt)?;
                    current = None;
                }
                (_, None) => {}
            }
        }
        Ok(self.completed)
    }

    fn complete(&mut self, following: &Following, learnt: Learnt) -> Result<()> {
        if self.sync {
            following.file.sync_all().map_err(Error::io("write", &following.partial))?;
            cache::forget(&following.file, 0, following.hashed);
        }
        if self.stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        fs::rename(&following.partial, &following.path).map_err(Error::io("rename", &following.partial))?;
        let mark = following.mark(learnt, true);
        self.journal.mark(&mark)?;
        self.completed.push(ShardRecord { name: mark.shard, bytes: mark.bytes, xxh3_128: mark.xxh3_128 });
        Ok(())
    }
}

impl Following {
    /// Hashes up to the given length.
    pub fn follow(&mut self, bytes: u64, piece: &mut [u8], stop: &AtomicBool) -> Result<()> {
        while self.hashed < bytes && !stop.load(Ordering::Relaxed) {
            let most = usize::try_from(bytes - self.hashed).unwrap_or(usize::MAX).min(piece.len());
            let Some(piece) = piece.get_mut(..most) else { break };
            self.file.read_exact_at(piece, self.hashed).map_err(Error::io("read back", &self.partial))?;
            self.hash.update(piece);
            self.hashed += most as u64;
        }
        Ok(())
    }

    /// XXH3 (128 bits) of what was hashed, in hexadecimal.
    pub fn digest(&self) -> String {
        format!("{:032x}", self.hash.digest128())
    }

    fn mark(&self, learnt: Learnt, complete: bool) -> Mark {
        Mark {
            shard: self.name.clone(),
            bytes: self.hashed,
            xxh3_128: self.digest(),
            complete,
            samples: learnt.samples,
            merged: learnt.merged,
        }
    }
}
