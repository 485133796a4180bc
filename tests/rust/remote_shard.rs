//! Conversion of a checkpoint whose shards come one by one.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use mqadapt_checkpoint::{Checkpoint, Error as CheckpointError, ShardHead, ShardSource};
use mqadapt_compress::{MergeOptions, method};
use mqadapt_convert::{ConvertOptions, Error, convert};
use mqadapt_core::{NoProgress, Plan};
use tempfile::TempDir;

use crate::synthetic::{Synthetic, files};

/// Lends copies of the shards of a folder; remembers what happened, and fails where told.
#[derive(Debug)]
struct Library {
    shelves: PathBuf,
    desk: TempDir,
    log: Mutex<Vec<String>>,
    held: Mutex<BTreeSet<String>>,
    torn: Mutex<Option<String>>,
}

impl ShardSource for Library {
    fn acquire(&self, shard: &str) -> io::Result<PathBuf> {
        self.log.lock().unwrap().push(shard.to_owned());
        let path = self.desk.path().join(shard);
        fs::copy(self.shelves.join(shard), &path)?;
        if self.torn.lock().unwrap().as_deref() == Some(shard) {
            fs::OpenOptions::new().write(true).open(&path)?.set_len(1000)?;
        }
        let mut held = self.held.lock().unwrap();
        held.insert(shard.to_owned());
        assert_eq!(held.len(), 1, "one shard at a time");
        Ok(path)
    }

    fn release(&self, shard: &str) {
        assert!(self.held.lock().unwrap().remove(shard));
        fs::remove_file(self.desk.path().join(shard)).unwrap();
    }
}

/// A folder with everything but the shards, their heads, and who lends them.
fn library(source: &Path) -> (TempDir, Vec<ShardHead>, Arc<Library>) {
    let folder = TempDir::new().unwrap();
    let mut heads = Vec::new();
    for (name, bytes) in files(source) {
        let to = folder.path().join(&name);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        if name.extension().is_some_and(|extension| extension == "safetensors") {
            let name = name.to_str().unwrap().to_owned();
            let head = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            heads.push(ShardHead {
                tag: name.clone(),
                name,
                bytes: bytes.len() as u64,
                head: bytes[..head + 7].to_vec(),
            });
        } else {
            fs::write(to, bytes).unwrap();
        }
    }
    let library = Library {
        shelves: source.to_owned(),
        desk: TempDir::new().unwrap(),
        log: Mutex::default(),
        held: Mutex::default(),
        torn: Mutex::default(),
    };
    (folder, heads, Arc::new(library))
}

fn options() -> ConvertOptions {
    let mut options = ConvertOptions::new(method("mean").unwrap(), MergeOptions::default());
    options.source_name = Some("org/name".to_owned());
    options
}

#[test]
fn each_shard_is_asked_for_once_and_given_back() {
    for max_shard_size in [None, Some(7_000), Some(60_000)] {
        let (source, out) = (Synthetic { per_shard: 6, ..Synthetic::default() }.folder(), TempDir::new().unwrap());
        let (folder, heads, library) = library(source.path());
        let options = ConvertOptions { max_shard_size, ..options() };
        let here = Checkpoint::open(source.path()).unwrap();
        let plan = Plan::parse("gqa2:all", here.config()).unwrap();
        convert(&here, &out.path().join("here"), &plan, &options, &NoProgress).unwrap();

        let source: Arc<dyn ShardSource> = library.clone();
        let remote = Checkpoint::open_remote(folder.path(), heads, &source).unwrap();
        assert!(library.log.lock().unwrap().is_empty(), "opening reads no shard");
        convert(&remote, &out.path().join("lent"), &plan, &options, &NoProgress).unwrap();
        let names: Vec<_> = here.shards().iter().map(|shard| shard.name().to_owned()).collect();
        assert_eq!(*library.log.lock().unwrap(), names);
        assert!(library.held.lock().unwrap().is_empty());
        assert_eq!(files(&out.path().join("lent")), files(&out.path().join("here")));
    }
}

#[test]
fn a_shard_that_was_cut_off_ends_it_and_resuming_asks_only_for_the_rest() {
    let (source, out) = (Synthetic { per_shard: 6, ..Synthetic::default() }.folder(), TempDir::new().unwrap());
    let (folder, heads, library) = library(source.path());
    let here = Checkpoint::open(source.path()).unwrap();
    let plan = Plan::parse("mqa:all", here.config()).unwrap();
    convert(&here, &out.path().join("here"), &plan, &options(), &NoProgress).unwrap();

    let names: Vec<_> = here.shards().iter().map(|shard| shard.name().to_owned()).collect();
    *library.torn.lock().unwrap() = Some(names[2].clone());
    let dst = out.path().join("lent");
    let options = ConvertOptions { resume: true, ..options() };
    let attempt = || {
        let source: Arc<dyn ShardSource> = library.clone();
        let remote = Checkpoint::open_remote(folder.path(), heads.clone(), &source).unwrap();
        convert(&remote, &dst, &plan, &options, &NoProgress)
    };
    let error = attempt().unwrap_err();
    assert!(matches!(&error, Error::Checkpoint(CheckpointError::RemoteShard { found: 1000, .. })), "{error}");
    library.held.lock().unwrap().clear();
    *library.torn.lock().unwrap() = None;
    attempt().unwrap();
    let asked = library.log.lock().unwrap();
    assert_eq!(asked[..3], names[..3]);
    assert_eq!(asked[3..], names[2..], "what was complete is not asked for again");
    assert_eq!(files(&dst), files(&out.path().join("here")));
}

#[test]
fn refuses_heads_that_are_not_what_they_say() {
    let source = Synthetic { per_shard: 6, ..Synthetic::default() }.folder();
    let (folder, heads, library) = library(source.path());
    let open = |heads: Vec<ShardHead>| {
        let source: Arc<dyn ShardSource> = library.clone();
        Checkpoint::open_remote(folder.path(), heads, &source).unwrap_err()
    };
    assert!(matches!(open(heads[1..].to_vec()), CheckpointError::MissingShard { .. }));
    let changed = |change: &dyn Fn(&mut ShardHead)| {
        let mut heads = heads.clone();
        change(&mut heads[0]);
        open(heads)
    };
    for error in [
        changed(&|head| head.head.truncate(5)),
        changed(&|head| head.head.truncate(100)),
        changed(&|head| head.bytes -= 1),
        changed(&|head| head.bytes = 3),
    ] {
        assert!(matches!(error, CheckpointError::Header { .. }), "{error}");
    }
}
