//! The output folder: a working folder beside it under another name, which gets the name when everything is in it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use mqadapt_checkpoint::{Checkpoint, open_regular};
use rustix::fs::{FlockOperation, RenameFlags, flock, fstatvfs, renameat_with};
use rustix::io::Errno;

use crate::layout::INDEX_FILE;
use crate::{ConvertOptions, Error, MANIFEST_FILE, Result};

/// Bytes copied at a time.
const COPY_BYTES: usize = 1 << 20;
/// What the name of an unfinished conversion ends in.
pub const PARTIAL_SUFFIX: &str = ".mqadapt-partial";

/// The output of a conversion that is under way.
pub(crate) struct Output {
    /// What it will be called.
    target: PathBuf,
    /// Where it is now.
    work: PathBuf,
    /// Folders that had to be made for it, innermost first.
    parents: Vec<PathBuf>,
    /// The working folder, locked against other processes.
    folder: File,
    sync: bool,
    keep: bool,
    finished: bool,
}

impl Output {
    /// Makes (or, to resume, finds) and locks the working folder. The second value: there was one.
    pub fn begin(checkpoint: &Checkpoint, dst: &Path, options: &ConvertOptions) -> Result<(Self, bool)> {
        let (target, parents) = resolve(dst)?;
        refuse_source(checkpoint, &target)?;
        if target.symlink_metadata().is_ok() {
            if !options.overwrite {
                return Err(Error::Exists { path: dst.to_owned() });
            }
            if !replaceable(&target) {
                return Err(Error::NotReplaceable { path: dst.to_owned() });
            }
        }
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(PARTIAL_SUFFIX);
        let work = target.with_file_name(name);
        let fresh = match fs::create_dir(&work) {
            Ok(()) => true,
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => false,
            Err(error) => {
                remove_empty(&parents);
                return Err(Error::io("create", &work)(error));
            }
        };
        let folder = lock(&work)?;
        let mut output = Self { target, work, parents, folder, sync: options.sync, keep: true, finished: false };
        if !fresh && !options.resume && !options.overwrite {
            return Err(Error::Unfinished { path: output.work.clone() }); // which stays
        }
        if !fresh && !options.resume {
            output.clear()?;
        }
        output.keep = options.resume;
        Ok((output, !fresh && options.resume))
    }

    /// The working folder.
    pub fn work(&self) -> &Path {
        &self.work
    }

    /// Fails if less than `needed` bytes are free.
    pub fn check_space(&self, needed: u64) -> Result<()> {
        let free = fstatvfs(&self.folder).map_err(Error::io("check the free space of", &self.work))?;
        let available = free.f_bavail.saturating_mul(free.f_frsize);
        if available < needed {
            return Err(Error::NoSpace { path: self.target.clone(), needed, available });
        }
        Ok(())
    }

    /// Bytes that an earlier run has written.
    pub fn bytes_there(&self) -> u64 {
        let Ok(entries) = fs::read_dir(&self.work) else { return 0 };
        // blocks, not lengths: a file may have holes where nothing was written yet
        entries.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.blocks() * 512)).sum()
    }

    /// Copies a file of any length, complete or not at all; returns its length. `go_on` is asked after each piece.
    pub fn copy(&self, name: &str, from: &Path, mut go_on: impl FnMut() -> Result<()>) -> Result<u64> {
        let (mut source, _) = open_regular(from)?;
        self.whole(name, |file, partial| {
            let mut piece = vec![0; COPY_BYTES];
            let mut copied = 0;
            loop {
                let count = match source.read(&mut piece) {
                    Ok(0) => return Ok(copied),
                    Ok(count) => count,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(Error::io("read", from)(error)),
                };
                file.write_all(piece.get(..count).unwrap_or_default()).map_err(Error::io("write", partial))?;
                copied += count as u64;
                go_on()?;
            }
        })
    }

    /// Writes a small file, complete or not at all; returns its length.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<u64> {
        self.whole(name, |file, partial| {
            file.write_all(bytes).map_err(Error::io("write", partial))?;
            Ok(bytes.len() as u64)
        })
    }

    /// A file that `fill` writes, under its name when it is complete; returns what `fill` does.
    fn whole(&self, name: &str, fill: impl FnOnce(&mut File, &Path) -> Result<u64>) -> Result<u64> {
        let path = self.work.join(name);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(Error::io("create", folder))?;
        }
        let partial = self.work.join(format!("{name}.partial"));
        let mut file = File::create(&partial).map_err(Error::io("create", &partial))?;
        let written = fill(&mut file, &partial)?;
        if self.sync {
            file.sync_all().map_err(Error::io("write", &partial))?;
        }
        fs::rename(&partial, &path).map_err(Error::io("rename", &partial))?;
        Ok(written)
    }

    /// Forgets what is not part of the result, gives the folder its name, and waits for the disk.
    pub fn commit(mut self, not_part: &[&str]) -> Result<()> {
        for name in not_part {
            let path = self.work.join(name);
            fs::remove_file(&path).map_err(Error::io("remove", &path))?;
        }
        self.sync_folder(&self.folder, &self.work)?;
        if self.target.symlink_metadata().is_ok() {
            self.replace()?;
        } else {
            fs::rename(&self.work, &self.target).map_err(Error::io("rename", &self.work))?;
        }
        self.finished = true;
        let parent = self.target.parent().unwrap_or(Path::new("/"));
        let opened = File::open(parent).map_err(Error::io("open", parent))?;
        self.sync_folder(&opened, parent)
    }

    /// Swaps the new folder with the old one, then removes the old one.
    fn replace(&self) -> Result<()> {
        use rustix::fs::CWD;
        match renameat_with(CWD, &self.work, CWD, &self.target, RenameFlags::EXCHANGE) {
            Ok(()) => fs::remove_dir_all(&self.work).map_err(Error::io("remove", &self.work)),
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                let mut name = self.work.file_name().unwrap_or_default().to_owned();
                name.push(".old");
                let old = self.work.with_file_name(name);
                fs::rename(&self.target, &old).map_err(Error::io("rename", &self.target))?;
                fs::rename(&self.work, &self.target).map_err(Error::io("rename", &self.work))?;
                fs::remove_dir_all(&old).map_err(Error::io("remove", &old))
            }
            Err(error) => Err(Error::io("replace", &self.target)(error)),
        }
    }

    fn sync_folder(&self, folder: &File, path: &Path) -> Result<()> {
        if self.sync { folder.sync_all().map_err(Error::io("write", path)) } else { Ok(()) }
    }

    /// Removes everything in the working folder.
    fn clear(&self) -> Result<()> {
        for entry in fs::read_dir(&self.work).map_err(Error::io("list", &self.work))? {
            let path = entry.map_err(Error::io("list", &self.work))?.path();
            let removed =
                if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(Error::io("remove", &path))?;
        }
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if !self.finished && !self.keep {
            // the error that brought us here is the one to tell
            let _ = fs::remove_dir_all(&self.work);
            remove_empty(&self.parents);
        }
    }
}

/// The absolute path of the output, its parents made; the second value lists those that were, innermost first.
fn resolve(dst: &Path) -> Result<(PathBuf, Vec<PathBuf>)> {
    if dst.exists() {
        return Ok((dst.canonicalize().map_err(Error::io("open", dst))?, Vec::new()));
    }
    let name = dst.file_name().ok_or_else(|| {
        let none = std::io::Error::from(std::io::ErrorKind::NotFound);
        Error::io("create", dst)(none)
    })?;
    let parent = dst.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let absent = parent.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists());
    let made: Vec<PathBuf> = absent.map(Path::to_owned).collect();
    if let Err(error) = fs::create_dir_all(parent) {
        remove_empty(&made);
        return Err(Error::io("create", parent)(error));
    }
    let made = made.iter().filter_map(|folder| folder.canonicalize().ok()).collect();
    Ok((parent.canonicalize().map_err(Error::io("open", parent))?.join(name), made))
}

/// The output must not be the source, nor hold it: replacing it would remove the source.
fn refuse_source(checkpoint: &Checkpoint, target: &Path) -> Result<()> {
    let files = checkpoint.shards().iter().map(mqadapt_checkpoint::Shard::path);
    for path in files.chain([checkpoint.path()]) {
        if path.canonicalize().is_ok_and(|path| path.starts_with(target)) {
            return Err(Error::InPlace { path: target.to_owned() });
        }
    }
    Ok(())
}

/// Whether a folder is one that `--overwrite` may replace: empty, or a checkpoint.
fn replaceable(target: &Path) -> bool {
    let checkpoint = ["config.json", MANIFEST_FILE, INDEX_FILE].iter().any(|name| target.join(name).is_file());
    target.is_dir() && (checkpoint || fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none()))
}

/// Opens and locks a folder. The lock ends with the process, however it ends.
fn lock(work: &Path) -> Result<File> {
    let folder = File::open(work).map_err(Error::io("open", work))?;
    match flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) | Err(Errno::NOTSUP | Errno::BADF | Errno::INVAL | Errno::NOSYS | Errno::NOLCK) => {} // NFS cannot
        Err(Errno::WOULDBLOCK) => return Err(Error::Locked { path: work.to_owned() }),
        Err(error) => return Err(Error::io("lock", work)(error)),
    }
    // between opening and locking, the process before may have finished and renamed it
    let (locked, named) = (folder.metadata(), fs::metadata(work));
    if locked.is_ok_and(|locked| named.is_ok_and(|named| locked.ino() == named.ino() && locked.dev() == named.dev())) {
        Ok(folder)
    } else {
        Err(Error::Locked { path: work.to_owned() })
    }
}

/// Removes the folders that are empty, innermost first.
fn remove_empty(folders: &[PathBuf]) {
    for folder in folders {
        if fs::remove_dir(folder).is_err() {
            return;
        }
    }
}
