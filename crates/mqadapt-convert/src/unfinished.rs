//! The unfinished file of a shard, as the reading thread sees it: what of it is there or on its way, and its checksum.
//!
//! What goes into the checksum is what was read from the source or computed from it, not what the disk gives back: it costs
//! no pass over the output, and `verify` compares the one with the other.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use crate::journal::{Learnt, Mark};
use crate::layout::OutputShard;
use crate::writer::Destination;
use crate::{Error, Result, ShardRecord};

/// Bytes hashed at a time: they stay in the second-level cache between the copy out of the kernel and the hash.
const PIECE: usize = 256 << 10;

/// A file that is being written.
pub(crate) struct Unfinished {
    name: String,
    file: Arc<File>,
    partial: PathBuf,
    path: PathBuf,
    /// Bytes that went into the checksum: all before here are in the file or on their way into it.
    pub hashed: u64,
    hash: Box<Xxh3>,
}

impl Unfinished {
    /// Opens the file, or makes it.
    pub fn open(work: &Path, shard: &OutputShard, marks: &[Mark]) -> Result<Self> {
        let path = work.join(&shard.name);
        let partial = partial(&path);
        if !marks.is_empty() && path.exists() && !partial.exists() {
            // killed between the last rename and the line in the journal
            fs::rename(&path, &partial).map_err(Error::io("rename", &path))?;
        }
        let file = Arc::new(open(&partial)?);
        Ok(Self { name: shard.name.clone(), file, partial, path, hashed: 0, hash: Box::new(Xxh3::new()) })
    }

    /// Takes what an earlier run has left for known, up to the last mark whose checksum the file still has (after a power
    /// failure, it may not have what was written last). Returns the number of such marks.
    pub fn resume(
        &mut self,
        shard: &OutputShard,
        marks: &[Mark],
        mut go_on: impl FnMut(u64) -> Result<()>,
    ) -> Result<usize> {
        let len = self.file.metadata().map_err(Error::io("open", &self.partial))?.len();
        for (at, mark) in marks.iter().enumerate() {
            if mark.bytes > len.min(shard.bytes) || mark.bytes < self.hashed {
                return Ok(at);
            }
            let before = (self.hashed, self.hash.clone());
            self.hash_from_file(mark.bytes, &mut go_on)?;
            if self.digest() != mark.xxh3_128 {
                (self.hashed, self.hash) = before;
                return Ok(at);
            }
        }
        Ok(marks.len())
    }

    /// Where it is, for the writer.
    pub fn destination(&self) -> Destination {
        Destination { file: Arc::clone(&self.file), partial: self.partial.clone(), path: self.path.clone() }
    }

    /// Takes the next bytes of the file into the checksum. Returns their offset.
    pub fn hash(&mut self, bytes: &[u8]) -> u64 {
        let offset = self.hashed;
        self.hash.update(bytes);
        self.hashed += bytes.len() as u64;
        offset
    }

    /// The next bytes of the file up to `end`, which are in it already. `go_on` is told how far it is.
    pub fn hash_from_file(&mut self, end: u64, mut go_on: impl FnMut(u64) -> Result<()>) -> Result<()> {
        let mut piece = vec![0; PIECE];
        while self.hashed < end {
            let most = usize::try_from(end - self.hashed).unwrap_or(usize::MAX).min(piece.len());
            let Some(piece) = piece.get_mut(..most) else { break };
            self.file.read_exact_at(piece, self.hashed).map_err(Error::io("read back", &self.partial))?;
            self.hash(piece);
            go_on(self.hashed)?;
        }
        Ok(())
    }

    /// A place to continue from: here.
    pub fn mark(&self, learnt: Learnt, complete: bool) -> Mark {
        Mark {
            shard: self.name.clone(),
            bytes: self.hashed,
            xxh3_128: self.digest(),
            complete,
            samples: learnt.samples,
            merged: learnt.merged,
        }
    }

    /// XXH3 (128 bits) of what was hashed, in hexadecimal.
    fn digest(&self) -> String {
        format!("{:032x}", self.hash.digest128())
    }
}

/// The record of a shard that an earlier run completed.
pub(crate) fn completed_before(work: &Path, shard: &OutputShard, marks: &[Mark]) -> Option<ShardRecord> {
    let last = marks.last().filter(|mark| mark.complete && mark.bytes == shard.bytes)?;
    let there = fs::metadata(work.join(&shard.name)).is_ok_and(|metadata| metadata.len() == shard.bytes);
    there.then(|| last.record())
}

/// The name of a shard while it is unfinished.
pub(crate) fn partial(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    path.with_file_name(name)
}

/// Opens an unfinished file, or makes it.
pub(crate) fn open(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).open(path).map_err(Error::io("create", path))
}
