//! The output folder: a working folder beside it under another name, which gets the name when everything is in it.
//!
//! What is not ours is neither removed nor written to: of a folder that is replaced, or begun again, only the files go that
//! its manifest or its journal lists, and another file there is an error that names it.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mqadapt_checkpoint::{Checkpoint, open_regular};
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, fstatvfs, renameat_with};
use rustix::io::Errno;
use serde_json::Value;

use crate::folder::directory::{Directory, Trust, in_words, partial};
use crate::manifest::MAX_MANIFEST_BYTES;
use crate::resume::journal::{self, JOURNAL_FILE};
use crate::{ConvertOptions, Error, MANIFEST_FILE, Manifest, Result};

/// What the name of an unfinished conversion ends in.
pub const PARTIAL_SUFFIX: &str = ".mqadapt-partial";

/// The output of a conversion that is under way.
pub(crate) struct Output {
    /// What it will be called.
    target: PathBuf,
    /// Where it is now; locked against other processes.
    work: Arc<Directory>,
    /// What is called so now, and the files in it that may be removed.
    replaced: Option<Replaced>,
    /// The files that are written into it.
    files: HashSet<String>,
    /// Folders that had to be made for it, innermost first.
    parents: Vec<PathBuf>,
    sync: bool,
    keep: bool,
    finished: bool,
}

/// A folder that the result takes the place of.
struct Replaced {
    folder: Directory,
    files: HashSet<String>,
}

impl Output {
    /// Makes (or, to resume, finds) and locks the working folder, for these files. The second value: there is one to resume.
    pub fn begin(
        checkpoint: &Checkpoint,
        dst: &Path,
        files: &[String],
        job: &Value,
        options: &ConvertOptions,
    ) -> Result<(Self, bool)> {
        let (target, parents) = resolve(dst)?;
        refuse_source(checkpoint, &target)?;
        let replaced = match target.symlink_metadata() {
            Ok(_) if !options.overwrite => return Err(Error::Exists { path: dst.to_owned() }),
            Ok(_) => Some(Replaced::open(dst, &target)?),
            Err(_) => None,
        };
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
        let work = Arc::new(Directory::open_ours(&work)?);
        lock(&work)?;
        let files = with_unfinished(files.iter().cloned());
        let sync = options.sync;
        let mut output = Self { target, work, replaced, files, parents, sync, keep: true, finished: false };
        let resumed = !fresh && output.take_over(job, options)?; // a folder that is refused stays
        output.keep = options.resume;
        Ok((output, resumed))
    }

    /// Looks at a working folder that was there: whether it is to be resumed. If not, it is emptied of what was written by us.
    fn take_over(&self, job: &Value, options: &ConvertOptions) -> Result<bool> {
        let folder = &self.work;
        let begun = folder.has(JOURNAL_FILE);
        let files = if begun {
            let same = journal::is_of(folder, job)?.then(|| self.files.clone());
            journal::files_beside(folder)?.into_iter().chain(same.into_iter().flatten()).collect()
        } else {
            // one that was killed right before or after it got its name has a manifest instead
            listed(folder).unwrap_or_default()
        };
        let files = with_unfinished(files);
        let strangers = folder.strangers(&files, Trust::Ours)?;
        if !strangers.is_empty() {
            let detail = format!("holds what no conversion is known to have written there ({})", in_words(&strangers));
            return Err(Error::Foreign { path: folder.path().to_owned(), detail });
        }
        if !options.resume && !options.overwrite {
            return Err(Error::Unfinished { path: folder.path().to_owned() });
        }
        let resumed = options.resume && begun;
        if !resumed {
            folder.remove_files(&files, JOURNAL_FILE)?;
        }
        Ok(resumed)
    }

    /// The working folder.
    pub fn work(&self) -> &Arc<Directory> {
        &self.work
    }

    /// Fails if less than `needed` bytes are free.
    pub fn check_space(&self, needed: u64) -> Result<()> {
        let free = fstatvfs(self.work.file()).map_err(Error::io("check the free space of", self.work.path()))?;
        let available = free.f_bavail.saturating_mul(free.f_frsize);
        if available < needed {
            return Err(Error::NoSpace { path: self.target.clone(), needed, available });
        }
        Ok(())
    }

    /// Bytes that an earlier run has written.
    pub fn bytes_there(&self) -> u64 {
        self.work.stored_bytes()
    }

    /// Copies a file of any length, complete or not at all; returns its length. `go_on` is asked after each piece.
    pub fn copy(&self, name: &str, from: &Path, go_on: impl FnMut() -> Result<()>) -> Result<u64> {
        let (source, _) = open_regular(from)?;
        self.work.write(name, source, from, self.sync, go_on)
    }

    /// Writes a small file, complete or not at all; returns its length.
    pub fn write(&self, name: &str, bytes: &[u8]) -> Result<u64> {
        self.work.write(name, bytes, self.work.path(), self.sync, || Ok(()))
    }

    /// Takes the journal away, gives the folder its name, and waits for the disk. A result that cannot have its name because
    /// something else has got it stays where it is, and can be resumed.
    pub fn commit(mut self) -> Result<()> {
        let checked = self.check_target();
        self.keep |= checked.is_err();
        checked?;
        let journal = journal::take(&self.work)?;
        let published = self.sync_folder(&self.work).and_then(|()| match &self.replaced {
            Some(replaced) if self.target.symlink_metadata().is_ok() => self.replace(replaced),
            _ => self.name(),
        });
        if let Err(error) = published {
            journal::put_back(&self.work, &journal)?;
            self.keep |= matches!(error, Error::Appeared { .. });
            return Err(error);
        }
        self.finished = true;
        let parent = self.target.parent().unwrap_or(Path::new("/"));
        let opened = File::open(parent).map_err(Error::io("open", parent))?;
        if self.sync {
            opened.sync_all().map_err(Error::io("write", parent))?;
        }
        self.remove_replaced()
    }

    /// Whether what is under the name now is what was there when the conversion began.
    fn check_target(&self) -> Result<()> {
        if !self.work.is_at(self.work.path()) {
            let detail = "was moved away or replaced while the conversion ran".to_owned();
            return Err(Error::Foreign { path: self.work.path().to_owned(), detail });
        }
        match &self.replaced {
            _ if self.target.symlink_metadata().is_err() => Ok(()),
            Some(replaced) => self.is_unchanged(replaced, &self.target),
            None => Err(self.appeared("appeared".to_owned())),
        }
    }

    /// Whether the folder that is replaced is here and has no other files than before.
    fn is_unchanged(&self, replaced: &Replaced, path: &Path) -> Result<()> {
        if !replaced.folder.is_at(path) {
            return Err(self.appeared("was replaced".to_owned()));
        }
        let strangers = replaced.strangers()?;
        if strangers.is_empty() {
            Ok(())
        } else {
            Err(self.appeared(format!("got other files ({})", in_words(&strangers))))
        }
    }

    fn appeared(&self, what: String) -> Error {
        Error::Appeared { path: self.target.clone(), what, work: self.work.path().to_owned() }
    }

    /// Gives the folder a name that nothing has.
    fn name(&self) -> Result<()> {
        let work = self.work.path();
        let renamed = match renameat_with(CWD, work, CWD, &self.target, RenameFlags::NOREPLACE) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) if self.target.symlink_metadata().is_ok() => {
                Err(Errno::EXIST)
            }
            // a folder never replaces anything but an empty folder
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => rustix::fs::rename(work, &self.target),
            renamed => renamed,
        };
        renamed.map_err(|error| match error {
            Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR => self.appeared("appeared".to_owned()),
            error => Error::io("rename", work)(error),
        })
    }

    /// Swaps the new folder with the old one.
    fn replace(&self, replaced: &Replaced) -> Result<()> {
        let (work, target) = (self.work.path(), self.target.as_path());
        let exchange = || renameat_with(CWD, work, CWD, target, RenameFlags::EXCHANGE);
        match exchange() {
            Ok(()) => {
                let ours = self.is_unchanged(replaced, work);
                if ours.is_err() {
                    exchange().map_err(Error::io("rename", target))?;
                }
                ours
            }
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                let old = old_name(work);
                rustix::fs::rename(target, &old).map_err(Error::io("rename", target))?; // over an empty folder at most
                self.is_unchanged(replaced, &old).and_then(|()| self.name()).or_else(|error| {
                    rustix::fs::rename(&old, target).map_err(Error::io("rename", &old))?;
                    Err(error)
                })
            }
            Err(error) => Err(Error::io("replace", target)(error)),
        }
    }

    /// Removes what the old folder had, now that the new one has its name.
    fn remove_replaced(&self) -> Result<()> {
        let Some(Replaced { folder, files }) = &self.replaced else { return Ok(()) };
        let old = old_name(self.work.path());
        let Some(old) = [self.work.path(), &old].into_iter().find(|path| folder.is_at(path)) else { return Ok(()) };
        folder.remove_files(files, MANIFEST_FILE)?;
        if fs::remove_dir(old).is_err() {
            let names = in_words(&folder.strangers(&HashSet::new(), Trust::Any)?);
            return Err(Error::LeftOver { path: self.target.clone(), old: old.to_owned(), names });
        }
        Ok(())
    }

    fn sync_folder(&self, folder: &Directory) -> Result<()> {
        if self.sync { folder.sync() } else { Ok(()) }
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if self.finished || self.keep {
            return;
        }
        // the error that brought us here is the one to tell. Twice: a thread may complete a file meanwhile
        for _ in 0..2 {
            let _ = self.work.remove_files(&self.files, JOURNAL_FILE);
            if self.work.is_at(self.work.path()) && fs::remove_dir(self.work.path()).is_ok() {
                break;
            }
        }
        remove_empty(&self.parents);
    }
}

impl Replaced {
    /// A folder that `--overwrite` may replace: in it is only what its manifest lists, or nothing.
    fn open(dst: &Path, target: &Path) -> Result<Self> {
        let wrong = |detail: String| Error::NotReplaceable { path: dst.to_owned(), detail };
        if !target.is_dir() || target.is_symlink() {
            return Err(wrong("is not a folder".to_owned()));
        }
        let folder = Directory::open(target)?;
        let files = listed(&folder).map_err(|error| match error {
            Error::Manifest { detail, .. } | Error::Foreign { detail, .. } => {
                wrong(format!("holds a {MANIFEST_FILE} that {detail}"))
            }
            error => error,
        })?;
        let replaced = Self { folder, files };
        let strangers = replaced.strangers()?;
        if strangers.is_empty() {
            return Ok(replaced);
        }
        Err(wrong(format!("holds what no {MANIFEST_FILE} there lists ({})", in_words(&strangers))))
    }

    /// What is in it that was not written by a conversion.
    fn strangers(&self) -> Result<Vec<String>> {
        self.folder.strangers(&self.files, Trust::Any)
    }
}

/// The files that the manifest of a folder lists; none where there is no manifest.
fn listed(folder: &Directory) -> Result<HashSet<String>> {
    let Some(json) = folder.read_small(MANIFEST_FILE, MAX_MANIFEST_BYTES)? else { return Ok(HashSet::new()) };
    let path = folder.path().join(MANIFEST_FILE);
    Manifest::parse(&json).map(|manifest| manifest.written()).map_err(|detail| Error::Manifest { path, detail })
}

/// The names that files have and that they have while they are written, and the journal's.
fn with_unfinished(files: impl IntoIterator<Item = String>) -> HashSet<String> {
    files.into_iter().flat_map(|name| [partial(&name), name]).chain([JOURNAL_FILE.to_owned()]).collect()
}

/// Where the old folder is for a moment, on file systems that cannot swap two.
fn old_name(work: &Path) -> PathBuf {
    let mut name = work.file_name().unwrap_or_default().to_owned();
    name.push(".old");
    work.with_file_name(name)
}

/// The absolute path of the output, its parents made; the second value lists those that were, innermost first.
fn resolve(dst: &Path) -> Result<(PathBuf, Vec<PathBuf>)> {
    let unnamed = || Error::Unnamed { path: dst.to_owned() };
    let name = dst.file_name().ok_or_else(unnamed)?; // of `.`, `..`, `/` and nothing at all there is none
    if dst.exists() {
        let target = dst.canonicalize().map_err(Error::io("open", dst))?;
        target.file_name().ok_or_else(unnamed)?; // a link to `/`
        return Ok((target, Vec::new()));
    }
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

/// Locks a folder. The lock ends with the process, however it ends.
fn lock(work: &Directory) -> Result<()> {
    let path = work.path();
    match flock(work.file(), FlockOperation::NonBlockingLockExclusive) {
        Ok(()) | Err(Errno::NOTSUP | Errno::BADF | Errno::INVAL | Errno::NOSYS | Errno::NOLCK) => {} // NFS cannot
        Err(Errno::WOULDBLOCK) => return Err(Error::Locked { path: path.to_owned() }),
        Err(error) => return Err(Error::io("lock", path)(error)),
    }
    // between opening and locking, the process before may have finished and renamed it
    if work.is_at(path) { Ok(()) } else { Err(Error::Locked { path: path.to_owned() }) }
}

/// Removes the folders that are empty, innermost first.
fn remove_empty(folders: &[PathBuf]) {
    for folder in folders {
        if fs::remove_dir(folder).is_err() {
            return;
        }
    }
}
