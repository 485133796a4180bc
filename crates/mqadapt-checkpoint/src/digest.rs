//! A hash over every byte of some weights. In: tensor names; out: what tells whether they are the same weights.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::{Checkpoint, Error, Result, Shard};

/// Bytes read at a time.
const PIECE: usize = 1 << 20;
/// Hashes that this process has computed, by the file, its last change and the place of the bytes.
static KNOWN: Mutex<Option<HashMap<u128, u128>>> = Mutex::new(None);

impl Checkpoint {
    /// XXH3 (128 bits, hexadecimal) of all stored bytes of the named tensors, in this order. [`Self::fingerprint`] samples;
    /// this reads everything, once in a process. Remote shards are fetched.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Shrunk`]; [`Error::MissingTensor`] for a name that the checkpoint does not have.
    pub fn weights_digest<S: AsRef<str>>(&self, names: impl IntoIterator<Item = S>) -> Result<String> {
        let mut all = Xxh3::new();
        for name in names {
            all.update(&self.tensor_digest(name.as_ref())?.to_le_bytes());
        }
        Ok(format!("{:032x}", all.digest128()))
    }

    fn tensor_digest(&self, name: &str) -> Result<u128> {
        let missing =
            || Error::MissingTensor { path: self.path().to_owned(), name: name.to_owned(), expected: Vec::new() };
        let tensor = self.tensor(name).ok_or_else(missing)?;
        let shard = self.shards().get(tensor.shard).ok_or_else(missing)?;
        let (offset, bytes) = (tensor.offset, tensor.bytes);
        let key = xxh3_128(format!("{} {offset} {bytes}", state(shard)).as_bytes());
        let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(digest) = known().as_ref().and_then(|known| known.get(&key)) {
            return Ok(*digest);
        }
        let mut hash = Xxh3::new();
        let mut piece = vec![0; PIECE];
        let mut at = 0;
        while at < bytes {
            let most = usize::try_from(bytes - at).unwrap_or(PIECE).min(PIECE);
            let Some(piece) = piece.get_mut(..most) else { break };
            shard.read_exact_at(offset + at, piece)?;
            hash.update(piece);
            at += most as u64;
        }
        let digest = hash.digest128();
        known().get_or_insert_default().insert(key, digest);
        Ok(digest)
    }
}

/// What changes whenever a file does. (`ctime` cannot be set back, as the time of the last write can.)
fn state(shard: &Shard) -> String {
    let (path, len, tag) = (shard.path(), shard.bytes(), shard.tag());
    let on_disk = fs::metadata(path).map(|found| (found.dev(), found.ino(), found.ctime(), found.ctime_nsec())).ok();
    format!("{} {len} {tag} {on_disk:?}", path.display())
}
