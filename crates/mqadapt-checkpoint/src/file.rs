//! Files that a user or a checkpoint names: regular ones only, opened read-only without waiting, read with `pread` or up to
//! a bound, never mapped. Every crate opens such files here.

use std::fs::{self, File, FileType, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;

use crate::{Error, Result};

/// Longest `config.json` or `generation_config.json` that is read; real ones have some kilobytes.
pub const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Longest plan file that is read; one of a thousand layers has some kilobytes. YAML takes eighty times its length in memory.
pub(crate) const MAX_PLAN_BYTES: u64 = 1 << 20;

/// Opens a regular file, and says how long it is. A symbolic link to one is followed, as the hub's cache has for every file.
///
/// # Errors
/// [`Error::Io`]; [`Error::NotACheckpoint`] for a pipe, a device, a socket or a folder.
pub fn open_regular(path: &Path) -> Result<(File, u64)> {
    // asked before opening, because opening a device can do something; and after, because the path can change in between
    refuse_special(path, fs::metadata(path).map_err(Error::io("open", path))?.file_type())?;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(OFlags::NONBLOCK.bits().cast_signed()); // a pipe would wait for its writer
    let file = options.open(path).map_err(Error::io("open", path))?;
    let metadata = file.metadata().map_err(Error::io("open", path))?;
    refuse_special(path, metadata.file_type())?;
    Ok((file, metadata.len()))
}

/// Refuses what is not a regular file.
fn refuse_special(path: &Path, found: FileType) -> Result<()> {
    let found = match found {
        found if found.is_file() => return Ok(()),
        found if found.is_dir() => "a folder",
        found if found.is_fifo() => "a pipe",
        found if found.is_socket() => "a socket",
        _ => "a device",
    };
    let detail =
        format!("expected a regular file, found {found}; write the content to a file and give that file's path");
    Err(Error::NotACheckpoint { path: path.to_owned(), detail })
}

/// Reads a whole small regular file; longer than `limit` is an error.
///
/// # Errors
/// As [`open_regular`]; [`Error::NotACheckpoint`] for one that is longer.
pub fn read_small(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let (file, _) = open_regular(path)?;
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(Error::io("read", path))?;
    if bytes.len() as u64 > limit {
        let detail = format!("expected at most {limit} bytes, found more; the file is not what its name says");
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixListener;
    use std::path::Path;

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::{open_regular, read_small};
    use crate::Error;

    #[test]
    fn only_regular_files_are_opened_and_nothing_waits() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        mknodat(CWD, path("pipe"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let _listening = UnixListener::bind(path("socket")).unwrap();
        for (path, expected) in [
            (path("pipe"), "a pipe"),
            (path("socket"), "a socket"),
            (folder.path().to_owned(), "a folder"),
            (Path::new("/dev/zero").to_owned(), "a device"),
        ] {
            let error = read_small(&path, 10).unwrap_err();
            let expected = format!("expected a regular file, found {expected};");
            assert!(matches!(&error, Error::NotACheckpoint { detail, .. } if detail.starts_with(&expected)), "{error}");
        }
        fs::write(path("file"), "0123456789").unwrap();
        std::os::unix::fs::symlink(path("file"), path("link")).unwrap();
        assert_eq!(open_regular(&path("link")).unwrap().1, 10);
        assert_eq!(read_small(&path("link"), 10).unwrap(), b"0123456789");
        let error = read_small(&path("file"), 9).unwrap_err();
        assert!(
            error.to_string().ends_with("expected at most 9 bytes, found more; the file is not what its name says")
        );
        assert!(matches!(open_regular(&path("none")), Err(Error::Io { .. })));
    }
}
