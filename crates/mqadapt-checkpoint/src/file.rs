//! Files of a checkpoint: opened read-only, read with `pread`, never mapped.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::{Error, Result};

/// Longest `config.json`, plan or manifest that is read.
pub(crate) const MAX_TEXT_BYTES: u64 = 16 << 20;

/// Opens a regular file (a symbolic link to one is followed, as the hub's cache has for every file).
pub(crate) fn open(path: &Path) -> Result<(File, u64)> {
    // asked before opening: opening a pipe would wait for its writer
    let metadata = fs::metadata(path).map_err(Error::io("open", path))?;
    if !metadata.is_file() {
        return Err(Error::NotACheckpoint { path: path.to_owned(), detail: "not a regular file".to_owned() });
    }
    let file = File::open(path).map_err(Error::io("open", path))?;
    let len = file.metadata().map_err(Error::io("open", path))?.len();
    Ok((file, len))
}

/// Reads a whole small file; longer than `limit` is an error.
pub(crate) fn read_small(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let (file, _) = open(path)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        let detail = format!("longer than {limit} bytes, so it is not what its name says");
        return Err(Error::NotACheckpoint { path: path.to_owned(), detail });
    }
    Ok(bytes)
}

/// Fills `out` from `offset` on.
pub(crate) fn read_exact_at(file: &File, path: &Path, mut offset: u64, mut out: &mut [u8]) -> Result<()> {
    while !out.is_empty() {
        match file.read_at(out, offset) {
            Ok(0) => return Err(Error::Shrunk { path: path.to_owned(), at: offset }),
            Ok(count) => {
                out = &mut out[count..];
                offset += count as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::io("read", path)(error)),
        }
    }
    Ok(())
}
