//! The unfinished file of a shard, as the reading thread sees it: what of it is there or on its way, and its checksum.
//!
//! What goes into the checksum is what was read from the source or computed from it, not what the disk gives back: it costs
//! no pass over the output, and `verify` compares the one with the other.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;

use crate::folder::destination::Destination;
use crate::folder::directory::{Directory, partial};
use crate::folder::page_cache::ReadHint;
use crate::layout::OutputShard;
use crate::resume::journal::{Learnt, Mark};
use crate::{Error, Result, ShardRecord};

/// Bytes hashed at a time: they stay in the second-level cache between the copy out of the kernel and the hash.
const PIECE: usize = 256 << 10;

/// A file that is being written.
pub(crate) struct Unfinished {
    name: String,
    file: Arc<File>,
    folder: Arc<Directory>,
    /// Its path while it is unfinished.
    partial: PathBuf,
    /// Bytes that went into the checksum: all before here are in the file or on their way into it.
    pub hashed: u64,
    hash: Box<Xxh3>,
}

impl Unfinished {
    /// Opens the file, or makes it.
    pub fn open(work: &Arc<Directory>, shard: &OutputShard, marks: &[Mark]) -> Result<Self> {
        let partial = partial(&shard.name);
        if !marks.is_empty() && work.has(&shard.name) && !work.has(&partial) {
            // killed between the last rename and the line in the journal
            work.rename(&shard.name, &partial)?;
        }
        let (file, path) = (Arc::new(work.open_or_create(&partial)?), work.path().join(partial));
        if file.metadata().map_err(Error::io("open", &path))?.len() > shard.bytes {
            file.set_len(shard.bytes).map_err(Error::io("write", &path))?;
        }
        let (name, folder, hash) = (shard.name.clone(), Arc::clone(work), Box::new(Xxh3::new()));
        Ok(Self { name, file, folder, partial: path, hashed: 0, hash })
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
        let (file, folder) = (Arc::clone(&self.file), Arc::clone(&self.folder));
        Destination { file, folder, partial: self.partial.clone(), name: self.name.clone() }
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

    /// A place to continue from: here. The one before it is at `from`.
    pub fn mark(&self, from: u64, learnt: Learnt, complete: bool) -> Mark {
        Mark {
            shard: self.name.clone(),
            from,
            bytes: self.hashed,
            xxh3_128: self.digest(),
            complete,
            samples: learnt.samples,
            merged: learnt.merged,
        }
    }

    /// XXH3 (128 bits) of what was hashed, in hexadecimal.
    fn digest(&self) -> String {
        digest(&self.hash)
    }
}

/// XXH3 (128 bits), in hexadecimal.
pub(crate) fn digest(hash: &Xxh3) -> String {
    format!("{:032x}", hash.digest128())
}

/// What an earlier run has left of a shard that it completed.
pub(crate) enum Completed {
    /// It is as it was written.
    Whole(ShardRecord),
    /// It is not; it is called unfinished again.
    Damaged,
    /// It was not completed, or is gone.
    No,
}

/// Compares a shard that an earlier run completed with its checksum. `go_on` is told how far it is.
pub(crate) fn completed_before(
    work: &Directory,
    shard: &OutputShard,
    marks: &[Mark],
    mut go_on: impl FnMut(u64) -> Result<()>,
) -> Result<Completed> {
    let Some(last) = marks.last().filter(|mark| mark.complete && mark.bytes == shard.bytes) else {
        return Ok(Completed::No);
    };
    let Some(file) = work.open_file(&shard.name)? else { return Ok(Completed::No) };
    let path = work.path().join(&shard.name);
    let file = Arc::new(file);
    if file.metadata().map_err(Error::io("open", &path))?.len() == shard.bytes {
        let _visit = ReadHint::announce(Arc::clone(&file), 0, shard.bytes);
        let (mut hash, mut piece, mut at) = (Xxh3::new(), vec![0; PIECE], 0);
        while at < shard.bytes {
            let most = usize::try_from(shard.bytes - at).unwrap_or(usize::MAX).min(PIECE);
            let Some(piece) = piece.get_mut(..most) else { break };
            file.read_exact_at(piece, at).map_err(Error::io("read back", &path))?;
            hash.update(piece);
            at += most as u64;
            go_on(at)?;
        }
        if digest(&hash) == last.xxh3_128 {
            return Ok(Completed::Whole(last.record()));
        }
    }
    work.rename(&shard.name, &partial(&shard.name))?;
    Ok(Completed::Damaged)
}
