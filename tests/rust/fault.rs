//! What a conversion leaves behind when the machine does not play along: kill, full disk, a place that cannot be written.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use mqadapt_checkpoint::Checkpoint;
use mqadapt_compress::{MergeOptions, method};
use mqadapt_convert::{ConvertOptions, Error, PARTIAL_SUFFIX, convert};
use mqadapt_core::{Interrupted, NoProgress, Plan, Progress};
use tempfile::TempDir;

use crate::synthetic::{CONFIG, Synthetic, files};

/// Set for a process that is there to be killed: source and output.
const CHILD: &str = "MQADAPT_TEST_CONVERT";
/// How often a conversion is killed.
const KILLS: u32 = 50;

fn options(resume: bool) -> ConvertOptions {
    ConvertOptions { resume, sync: false, ..ConvertOptions::new(method("mean").unwrap(), MergeOptions::default()) }
}

fn run(src: &Path, dst: &Path, options: &ConvertOptions, progress: &dyn Progress) -> Result<(), Error> {
    let checkpoint = Checkpoint::open(src)?;
    let plan = Plan::parse("gqa2:0; mqa:last2", checkpoint.config()).unwrap();
    convert(&checkpoint, dst, &plan, options, progress).map(|_| ())
}

/// A checkpoint of seven files, and what it becomes when nothing goes wrong.
fn source() -> (TempDir, TempDir) {
    let config = CONFIG.replace("\"vocab_size\": 50", "\"vocab_size\": 500");
    let source = Synthetic { config, per_shard: 6, ..Synthetic::default() }.folder();
    let whole = TempDir::new().unwrap();
    run(source.path(), &whole.path().join("dst"), &options(false), &NoProgress).unwrap();
    (source, whole)
}

/// Slow enough to be killed at any moment.
struct Slow;

impl Progress for Slow {
    fn advance(&self, _: &str, _: u64, _: u64) -> Result<(), Interrupted> {
        thread::sleep(Duration::from_micros(300));
        Ok(())
    }
}

/// Not a test: what the process does that the next test kills.
#[test]
fn child() {
    let Ok(paths) = std::env::var(CHILD) else { return };
    let (src, dst) = paths.split_once('|').unwrap();
    run(Path::new(src), Path::new(dst), &options(true), &Slow).unwrap();
}

#[test]
fn a_killed_conversion_never_looks_complete_and_resumes_to_the_same_bytes() {
    let (source, whole) = source();
    let expected = files(&whole.path().join("dst"));
    let out = TempDir::new().unwrap();
    let dst = out.path().join("dst");
    let (mut kills, mut completed, mut random) = (0, 0, 7u64);
    while kills < KILLS {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "fault::child"])
            .env(CHILD, format!("{}|{}", source.path().display(), dst.display()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        thread::sleep(Duration::from_micros((random >> 33) % 40_000));
        process.kill().unwrap();
        let status = process.wait().unwrap();
        kills += u32::from(!status.success());
        if dst.exists() {
            assert_eq!(files(&dst), expected, "under its name there is only a complete one");
            fs::remove_dir_all(&dst).unwrap();
            completed += 1;
        } else if status.success() {
            panic!("nothing was written");
        }
    }
    run(source.path(), &dst, &options(true), &NoProgress).unwrap();
    assert_eq!(files(&dst), expected);
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 1);
    println!("{kills} kills, {completed} conversions completed between them");
}

/// Stops after so many bytes.
struct StopAt(u64);

impl Progress for StopAt {
    fn advance(&self, _: &str, done: u64, _: u64) -> Result<(), Interrupted> {
        if done > self.0 { Err(Interrupted) } else { Ok(()) }
    }
}

/// As after a power failure: the journal knows more than the disk has kept.
#[test]
fn what_the_disk_lost_is_written_again() {
    let (source, whole) = source();
    let out = TempDir::new().unwrap();
    let (dst, partial) = (out.path().join("dst"), out.path().join(format!("dst{PARTIAL_SUFFIX}")));
    let total: u64 = files(&whole.path().join("dst")).iter().map(|(_, bytes)| bytes.len() as u64).sum();
    run(source.path(), &dst, &options(true), &StopAt(total / 2)).unwrap_err();
    let shards: Vec<_> = fs::read_dir(&partial).unwrap().map(|entry| entry.unwrap().path()).collect();
    for path in shards.iter().filter(|path| path.to_str().unwrap().contains(".safetensors")) {
        // the first bytes of unfinished files turn to zeros, and complete ones vanish
        if path.extension().unwrap() == "partial" {
            let mut bytes = fs::read(path).unwrap();
            let lost = bytes.len().min(500);
            bytes[..lost].fill(0);
            fs::write(path, bytes).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    }
    let journal = partial.join("mqadapt.journal.jsonl");
    let mut text = fs::read(&journal).unwrap();
    text.extend(b"{\"shard\": \"torn");
    fs::write(&journal, text).unwrap();
    run(source.path(), &dst, &options(true), &NoProgress).unwrap();
    assert_eq!(files(&dst), files(&whole.path().join("dst")));
}

/// Fills the disk while the conversion runs.
struct Fill<'a>(&'a Path);

impl Progress for Fill<'_> {
    fn advance(&self, _: &str, _: u64, _: u64) -> Result<(), Interrupted> {
        let _ = fs::write(self.0.join("filler"), vec![1; 2 << 20]);
        Ok(())
    }
}

/// On a real file system that fills up while the conversion runs, where mounting is allowed.
#[test]
fn a_file_system_that_fills_up_leaves_nothing() {
    let (source, _) = source();
    let disk = TempDir::new().unwrap();
    let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1500k", "tmpfs"]).arg(disk.path()).output();
    if !mount.is_ok_and(|output| output.status.success()) {
        println!("skipped: mounting is not allowed here");
        return;
    }
    let dst = disk.path().join("dst");
    let filled = run(source.path(), &dst, &options(false), &Fill(disk.path()));
    let left: Vec<_> = fs::read_dir(disk.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let too_small = run(source.path(), &dst, &options(false), &NoProgress);
    Command::new("umount").arg(disk.path()).status().unwrap();
    let error = filled.unwrap_err();
    assert!(matches!(&error, Error::Io { source, .. } if source.kind() == ErrorKind::StorageFull), "{error}");
    assert_eq!(left, ["filler"]);
    assert!(matches!(too_small, Err(Error::NoSpace { needed, available, .. }) if needed > available));
}

#[test]
fn a_place_that_cannot_be_written_is_one_error() {
    let (source, _) = source();
    for dst in ["/proc/mqadapt/dst", "/dev/null/dst", "/proc/self/dst"] {
        let error = run(source.path(), Path::new(dst), &options(false), &NoProgress).unwrap_err();
        assert!(matches!(error, Error::Io { .. }), "{dst}: {error}");
        assert!(error.to_string().contains("cannot create"), "{error}");
    }
}

/// Does something to the source once, in the middle of the conversion.
struct Meanwhile<F: Fn() + Sync>(F, AtomicBool);

impl<F: Fn() + Sync> Progress for Meanwhile<F> {
    fn advance(&self, _: &str, done: u64, total: u64) -> Result<(), Interrupted> {
        if done > total / 3 && done < total && !self.1.swap(true, Ordering::Relaxed) {
            (self.0)();
        }
        Ok(())
    }
}

#[test]
fn a_source_that_changes_while_it_is_read_is_one_error() {
    let last = "model-00007-of-00007.safetensors";
    let write_to = |path: &Path| {
        let mut bytes = fs::read(path).unwrap();
        let at = bytes.len() - 1;
        bytes[at] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    let shrink = |path: &Path| {
        let len = fs::metadata(path).unwrap().len();
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len(len - 100).unwrap();
    };
    let swap = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        fs::remove_file(path).unwrap();
        fs::write(path, bytes).unwrap();
    };
    let changes: [fn(&Path); 3] = [write_to, shrink, swap];
    for (change, words) in changes.into_iter().zip(["was changed while", "changed", "was changed while"]) {
        let ((source, _), out) = (source(), TempDir::new().unwrap());
        let path = source.path().join(last);
        let dst = out.path().join("dst");
        let meanwhile = Meanwhile(|| change(&path), AtomicBool::new(false));
        let error = run(source.path(), &dst, &options(false), &meanwhile).unwrap_err();
        assert!(meanwhile.1.into_inner(), "nothing was changed");
        assert!(error.to_string().contains(words) && error.to_string().contains(last), "{error}");
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
    }
}
