//! A folder that files are written into, held by its descriptor: names are looked up in it and never through a link.
//!
//! In: a path. Out: files that are regular, have one name and belong to this user, whoever else can write beside them.

use std::collections::HashSet;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, mkdirat, openat, renameat, statat, unlinkat};
use rustix::io::Errno;

use crate::{Error, Result};

/// Most names that a message lists.
const NAMES: usize = 5;

/// A folder, open.
#[derive(Debug)]
pub(crate) struct Directory {
    file: File,
    path: PathBuf,
    /// The user that files made here belong to. Not always this process's: a server may map users.
    owner: u32,
}

/// What is under a name.
struct Entry {
    name: OsString,
    stat: Stat,
}

impl Entry {
    fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }
}

/// What else a file has to be than regular.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trust {
    /// Nothing: it is removed at most.
    Any,
    /// This user's, and under no other name: it is read, continued or published.
    Ours,
}

impl Directory {
    /// Opens a folder. The last part of the path is no link.
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat(rustix::fs::CWD, path, flags, Mode::empty()) {
            Ok(file) => Ok(Self { file: file.into(), path: path.to_owned(), owner: this_user() }),
            Err(Errno::LOOP | Errno::NOTDIR) => {
                Err(foreign(path, "is a symbolic link or a file, where a folder is expected"))
            }
            Err(error) => Err(Error::io("open", path)(error)),
        }
    }

    /// Opens a folder of this user's.
    pub fn open_ours(path: &Path) -> Result<Self> {
        let mut folder = Self::open(path)?;
        let owner = fstat(&folder.file).map_err(Error::io("open", path))?.st_uid;
        if owner != folder.owner && folder.owner_of_new_files() == Some(owner) {
            folder.owner = owner;
        }
        if owner == folder.owner {
            return Ok(folder);
        }
        Err(foreign(path, &format!("belongs to another user (number {owner}, this one is {})", folder.owner)))
    }

    /// Whom a file belongs to that is made here: an NFS server, for one, maps users.
    fn owner_of_new_files(&self) -> Option<u32> {
        let name = format!(".mqadapt-owner-{}", std::process::id());
        let file = openat(&self.file, &*name, create_flags(), Mode::from_raw_mode(0o600)).ok()?;
        let owner = fstat(&file).ok().map(|stat| stat.st_uid);
        unlinkat(&self.file, &*name, AtFlags::empty()).ok()?;
        owner
    }

    /// Its path, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its descriptor.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Whether the path still leads to this folder.
    pub fn is_at(&self, path: &Path) -> bool {
        let (held, named) = (fstat(&self.file), statat(rustix::fs::CWD, path, AtFlags::SYMLINK_NOFOLLOW));
        held.is_ok_and(|held| named.is_ok_and(|named| (held.st_ino, held.st_dev) == (named.st_ino, named.st_dev)))
    }

    /// A folder in it; made where `make` says so.
    fn below(&self, name: &str, make: bool) -> Result<Self> {
        let path = self.path.join(name);
        if make {
            match mkdirat(&self.file, name, Mode::from_raw_mode(0o777)) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(Error::io("create", &path)(error)),
            }
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat(&self.file, name, flags, Mode::empty()) {
            Ok(file) => Ok(Self { file: file.into(), path, owner: self.owner }),
            Err(Errno::LOOP | Errno::NOTDIR) => {
                Err(foreign(&path, "is a symbolic link or a file, where a folder is expected"))
            }
            Err(error) => Err(Error::io("open", &path)(error)),
        }
    }

    /// Makes a file that was not there.
    pub fn create(&self, name: &str) -> Result<File> {
        match openat(&self.file, name, create_flags(), Mode::from_raw_mode(0o666)) {
            Ok(file) => Ok(file.into()),
            Err(error) => Err(Error::io("create", &self.path.join(name))(error)),
        }
    }

    /// Opens a file for reading and writing; `None` where there is none.
    pub fn open_file(&self, name: &str) -> Result<Option<File>> {
        let path = self.path.join(name);
        // without waiting: a pipe has no other end
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.file, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => return Err(foreign(&path, "is a symbolic link")),
            Err(error) => return Err(Error::io("open", &path)(error)),
        };
        let stat = fstat(&file).map_err(Error::io("open", &path))?;
        match self.objection(&stat, Trust::Ours) {
            None => Ok(Some(file)),
            Some(objection) => Err(foreign(&path, &format!("is {objection}"))),
        }
    }

    /// Opens a file for reading and writing, or makes it.
    pub fn open_or_create(&self, name: &str) -> Result<File> {
        self.open_file(name)?.map_or_else(|| self.create(name), Ok)
    }

    /// The content of a small file; `None` where there is none. Of a longer one, the first `limit` bytes.
    pub fn read_small(&self, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let path = self.path.join(name);
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match openat(&self.file, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => return Err(foreign(&path, "is a symbolic link")),
            Err(error) => return Err(Error::io("open", &path)(error)),
        };
        if !file.metadata().map_err(Error::io("open", &path))?.is_file() {
            return Err(foreign(&path, "is not a regular file"));
        }
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes).map_err(Error::io("read", &path))?;
        Ok(Some(bytes))
    }

    /// Writes a file, complete or not at all; `name` may have a folder before a `/`. Returns its length. `go_on` is asked
    /// after each piece.
    pub fn write(
        &self,
        name: &str,
        mut content: impl Read,
        from: &Path,
        sync: bool,
        mut go_on: impl FnMut() -> Result<()>,
    ) -> Result<u64> {
        if let Some((folder, name)) = name.split_once('/') {
            return self.below(folder, true)?.write_below(name, &mut content, from, sync, &mut go_on);
        }
        self.write_below(name, &mut content, from, sync, &mut go_on)
    }

    fn write_below(
        &self,
        name: &str,
        content: &mut dyn Read,
        from: &Path,
        sync: bool,
        go_on: &mut dyn FnMut() -> Result<()>,
    ) -> Result<u64> {
        let partial = partial(name);
        let path = self.path.join(&partial);
        self.remove(&partial)?; // of an earlier run
        let mut file = self.create(&partial)?;
        let mut piece = vec![0; 64 << 10];
        let mut written = 0;
        loop {
            let count = match content.read(&mut piece) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::io("read", from)(error)),
            };
            file.write_all(piece.get(..count).unwrap_or_default()).map_err(Error::io("write", &path))?;
            written += count as u64;
            go_on()?;
        }
        if sync {
            file.sync_all().map_err(Error::io("write", &path))?;
        }
        self.rename(&partial, name)?;
        Ok(written)
    }

    /// Gives a file in it another name.
    pub fn rename(&self, from: &str, to: &str) -> Result<()> {
        renameat(&self.file, from, &self.file, to).map_err(Error::io("rename", &self.path.join(from)))
    }

    /// Removes a file, if it is there.
    pub fn remove(&self, name: &str) -> Result<()> {
        match unlinkat(&self.file, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(Error::io("remove", &self.path.join(name))(error)),
        }
    }

    /// Whether something is under this name.
    pub fn has(&self, name: &str) -> bool {
        statat(&self.file, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    }

    /// Waits until the disk knows which files are in it.
    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(Error::io("write", &self.path))
    }

    /// Bytes of the files in it. Blocks, not lengths: a file may have holes where nothing was written yet.
    pub fn stored_bytes(&self) -> u64 {
        let entries = self.entries().unwrap_or_default();
        entries.iter().filter_map(|entry| u64::try_from(entry.stat.st_blocks).ok()).map(|blocks| blocks * 512).sum()
    }

    /// Everything in it that is not one of these files, in words: `notes.txt`, `model.safetensors (a symbolic link)`.
    pub fn strangers(&self, files: &HashSet<String>, trust: Trust) -> Result<Vec<String>> {
        let mut out = Vec::new();
        self.find_strangers("", files, trust, &mut out)?;
        out.sort();
        Ok(out)
    }

    fn find_strangers(&self, prefix: &str, files: &HashSet<String>, trust: Trust, out: &mut Vec<String>) -> Result<()> {
        for entry in self.entries()? {
            let name = entry.name.to_str().map(|name| format!("{prefix}{name}"));
            let shown = format!("{prefix}{}", entry.name.to_string_lossy()).escape_debug().to_string();
            match (entry.kind(), name) {
                (FileType::Directory, Some(name)) if prefix.is_empty() && holds_one_of(files, &name) => {
                    if trust == Trust::Ours && entry.stat.st_uid != self.owner {
                        out.push(format!("{shown}/ (of another user)"));
                    } else {
                        self.below(&name, false)?.find_strangers(&format!("{name}/"), files, trust, out)?;
                    }
                }
                (FileType::Directory, _) => out.push(format!("{shown}/")),
                (_, Some(name)) if files.contains(&name) => {
                    out.extend(self.objection(&entry.stat, trust).map(|objection| format!("{shown} ({objection})")));
                }
                _ => out.push(shown),
            }
        }
        Ok(())
    }

    /// Removes these files, where they are regular ones, and the folders inside that have none left; `last` as the last one.
    /// Nothing else is touched.
    pub fn remove_files(&self, files: &HashSet<String>, last: &str) -> Result<()> {
        self.remove_below("", files, Some(last))?;
        if files.contains(last) && self.is_regular(last) { self.remove(last) } else { Ok(()) }
    }

    fn remove_below(&self, prefix: &str, files: &HashSet<String>, except: Option<&str>) -> Result<()> {
        for entry in self.entries()? {
            let Some(name) = entry.name.to_str() else { continue };
            let full = format!("{prefix}{name}");
            match entry.kind() {
                FileType::Directory if prefix.is_empty() && holds_one_of(files, name) => {
                    self.below(name, false)?.remove_below(&format!("{name}/"), files, None)?;
                    match unlinkat(&self.file, name, AtFlags::REMOVEDIR) {
                        Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => {}
                        Err(error) => return Err(Error::io("remove", &self.path.join(name))(error)),
                    }
                }
                FileType::RegularFile if files.contains(&full) && except != Some(name) => self.remove(name)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn is_regular(&self, name: &str) -> bool {
        let stat = statat(&self.file, name, AtFlags::SYMLINK_NOFOLLOW);
        stat.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile)
    }

    /// Why a file is not to be trusted; `None` if it is.
    fn objection(&self, stat: &Stat, trust: Trust) -> Option<&'static str> {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {}
            FileType::Symlink => return Some("a symbolic link"),
            _ => return Some("not a regular file"),
        }
        match trust {
            Trust::Any => None,
            Trust::Ours if stat.st_uid != self.owner => Some("of another user"),
            Trust::Ours => (stat.st_nlink != 1).then_some("a hard link"),
        }
    }

    fn entries(&self) -> Result<Vec<Entry>> {
        let list = |error: Errno| Error::io("list", &self.path)(error);
        let mut out = Vec::new();
        for entry in Dir::read_from(&self.file).map_err(list)? {
            let name = OsStr::from_bytes(entry.map_err(list)?.file_name().to_bytes()).to_owned();
            if name == "." || name == ".." {
                continue;
            }
            match statat(&self.file, &*name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => out.push(Entry { name, stat }),
                Err(Errno::NOENT) => {} // removed meanwhile
                Err(error) => return Err(list(error)),
            }
        }
        Ok(out)
    }
}

/// The name of a file while it is unfinished.
pub(crate) fn partial(name: &str) -> String {
    format!("{name}.partial")
}

/// Names for a message: the first few, and how many there are.
pub(crate) fn in_words(names: &[String]) -> String {
    let shown = names.iter().take(NAMES).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len() {
        count if count > NAMES => format!("{shown} and {} more", count - NAMES),
        _ => shown,
    }
}

fn foreign(path: &Path, detail: &str) -> Error {
    Error::Foreign { path: path.to_owned(), detail: detail.to_owned() }
}

fn holds_one_of(files: &HashSet<String>, folder: &str) -> bool {
    files.iter().any(|file| file.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/')))
}

fn create_flags() -> OFlags {
    OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC
}

fn this_user() -> u32 {
    // SAFETY: the call has no arguments and cannot fail
    unsafe { libc::geteuid() }
}
