//! What a conversion does when a system call fails. A filter of the kernel (seccomp) makes the calls of a child process fail
//! with an error number, from an offset on where they have one: the code that runs is the one that always runs.
#![cfg(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64")))]

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use mqadapt_checkpoint::Checkpoint;
use mqadapt_compress::{MergeOptions, method};
use mqadapt_convert::{ConvertOptions, Error, PARTIAL_SUFFIX, convert};
use mqadapt_core::{Interrupted, Plan, Progress};
use tempfile::TempDir;

use crate::synthetic::{Synthetic, files};

/// Set for a child: source, output, `resume` or `once`, then system call, error and offset, all with `|` between.
const CHILD: &str = "MQADAPT_TEST_INJECTED";

fn run(src: &Path, dst: &Path, resume: bool) -> Result<(), Error> {
    let checkpoint = Checkpoint::open(src)?;
    let plan = Plan::parse("gqa2:0; mqa:last2", checkpoint.config()).unwrap();
    let options = ConvertOptions { resume, ..ConvertOptions::new(method("mean").unwrap(), MergeOptions::default()) };
    convert(&checkpoint, dst, &plan, &options, &Appear(dst)).map(|_| ())
}

/// Set for a child under whose output's name a folder appears meanwhile.
const APPEARS: &str = "MQADAPT_TEST_APPEARS";

/// Makes a folder of this name with a file in it, if one is to appear.
struct Appear<'a>(&'a Path);

impl Progress for Appear<'_> {
    fn advance(&self, _: &str, _: u64, _: u64) -> Result<(), Interrupted> {
        if std::env::var_os(APPEARS).is_some() {
            fs::create_dir_all(self.0).unwrap();
            fs::write(self.0.join("thesis.txt"), "years of work").unwrap();
        }
        Ok(())
    }
}

/// Makes a system call of this thread, and of those it starts, fail. With `from`, only those whose fourth argument, an offset,
/// is not below it.
fn inject(call: libc::c_long, errno: i32, from: u32) {
    let filter = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let (load, equal, at_least, give) =
        (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, libc::BPF_JMP | libc::BPF_JEQ, libc::BPF_JMP | libc::BPF_JGE, 6);
    let fourth = 16 + 3 * 8; // of `struct seccomp_data`: number, architecture, instruction pointer, arguments
    let mut filters = [
        filter(load, 0, 0, 0),
        filter(equal, 0, 3, u32::try_from(call).unwrap()),
        filter(load, 0, 0, fourth),
        filter(at_least, 0, 1, from),
        filter(give, 0, 0, libc::SECCOMP_RET_ERRNO | u32::try_from(errno).unwrap()),
        filter(give, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filters.len() as u16, filter: filters.as_mut_ptr() };
    // SAFETY: the program and its filters outlive the calls, which read them only
    let refused = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) != 0
    };
    assert!(!refused, "no filter: {}", std::io::Error::last_os_error());
}

/// Not a test: what the child of the next ones does.
#[test]
fn child() {
    let Ok(told) = std::env::var(CHILD) else { return };
    let [src, dst, resume, call, errno, from] = told.split('|').collect::<Vec<_>>().try_into().unwrap();
    inject(call.parse().unwrap(), errno.parse().unwrap(), from.parse().unwrap());
    match run(Path::new(src), Path::new(dst), resume == "resume") {
        Ok(()) => println!("\nconverted"),
        Err(error) => println!("\nerror: {error}"),
    }
}

/// A conversion in a process where a system call fails. What it prints: `converted`, or `error:` and the error.
fn outcome(src: &Path, dst: &Path, resume: bool, fault: (libc::c_long, i32, u32)) -> String {
    outcome_with(src, dst, resume, fault, &[])
}

fn outcome_with(
    src: &Path,
    dst: &Path,
    resume: bool,
    (call, errno, from): (libc::c_long, i32, u32),
    environment: &[(&str, &str)],
) -> String {
    let resume = if resume { "resume" } else { "once" };
    let told = format!("{}|{}|{resume}|{call}|{errno}|{from}", src.display(), dst.display());
    let Output { stdout, stderr, .. } = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "injected::child", "--nocapture"])
        .env(CHILD, told)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8(stdout).unwrap();
    let line = text.lines().find(|line| line.starts_with("converted") || line.starts_with("error: "));
    line.unwrap_or_else(|| panic!("{text}{}", String::from_utf8_lossy(&stderr))).to_owned()
}

/// Offset inside the tensors: headers can still be read.
const INSIDE: u32 = 6_000;

#[test]
fn a_failing_call_is_one_error_and_leaves_nothing_or_something_resumable() {
    let source = Synthetic { per_shard: 20, ..Synthetic::default() }.folder();
    let out = TempDir::new().unwrap();
    let (dst, whole) = (out.path().join("dst"), out.path().join("whole"));
    let partial = out.path().join(format!("dst{PARTIAL_SUFFIX}"));
    run(source.path(), &whole, false).unwrap();
    let expected = files(&whole);
    let source_before = files(source.path());
    let (read, written) = ("cannot read", "cannot write");
    for (call, errno, from, words) in [
        (libc::SYS_pread64, libc::EIO, INSIDE, [read, "Input/output error", "model-00001-of-"]),
        (libc::SYS_pread64, libc::ESTALE, INSIDE, [read, "Stale file handle", "model-00001-of-"]),
        (libc::SYS_pwrite64, libc::EIO, INSIDE, [written, "Input/output error", "safetensors.partial"]),
        (libc::SYS_pwrite64, libc::ENOSPC, INSIDE, [written, "No space left", "safetensors.partial"]),
        (libc::SYS_pwrite64, libc::EDQUOT, INSIDE, [written, "quota", "safetensors.partial"]),
        (libc::SYS_pwrite64, libc::EROFS, 0, [written, "Read-only file system", "safetensors.partial"]),
        (libc::SYS_sync_file_range, libc::EIO, 0, [written, "Input/output error", "safetensors.partial"]),
        (libc::SYS_fsync, libc::EIO, 0, [written, "Input/output error", "dst.mqadapt-partial"]),
        (libc::SYS_fdatasync, libc::EIO, 0, [written, "Input/output error", "journal"]),
    ] {
        let fault = (call, errno, from);
        let said = outcome(source.path(), &dst, false, fault);
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
        let left: Vec<_> = fs::read_dir(out.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["whole"], "{said}");

        let said = outcome(source.path(), &dst, true, fault);
        assert!(words.iter().all(|word| said.contains(word)), "{words:?}: {said}");
        assert!(!dst.exists() && partial.exists());
        run(source.path(), &dst, true).unwrap();
        assert_eq!(files(&dst), expected, "{said}");
        fs::remove_dir_all(&dst).unwrap();
        assert_eq!(files(source.path()), source_before);
    }
}

/// Hints are not needed: a system that has none of them converts as well.
#[test]
fn calls_that_a_system_may_lack_are_not_needed() {
    let source = Synthetic { per_shard: 20, ..Synthetic::default() }.folder();
    let out = TempDir::new().unwrap();
    let whole = out.path().join("whole");
    run(source.path(), &whole, false).unwrap();
    for (number, call) in
        [libc::SYS_sync_file_range, libc::SYS_fadvise64, libc::SYS_flock, libc::SYS_renameat2].into_iter().enumerate()
    {
        let dst = out.path().join(format!("dst{number}"));
        assert_eq!(outcome(source.path(), &dst, false, (call, libc::ENOSYS, 0)), "converted");
        assert_eq!(files(&dst), files(&whole));
    }
}

/// Nor are they needed to leave alone what appears meanwhile.
#[test]
fn what_appears_stays_where_a_rename_cannot_refuse_to_replace() {
    let source = Synthetic { per_shard: 20, ..Synthetic::default() }.folder();
    let out = TempDir::new().unwrap();
    let (dst, whole) = (out.path().join("dst"), out.path().join("whole"));
    run(source.path(), &whole, false).unwrap();
    for errno in [libc::ENOSYS, libc::EINVAL] {
        let said = outcome_with(source.path(), &dst, false, (libc::SYS_renameat2, errno, 0), &[(APPEARS, "1")]);
        assert!(said.contains("appeared while"), "{said}");
        assert_eq!(files(&dst), [("thesis.txt".into(), b"years of work".to_vec())]);
        fs::remove_dir_all(&dst).unwrap();
        let said = outcome(source.path(), &dst, true, (libc::SYS_renameat2, errno, 0));
        assert_eq!(said, "converted");
        assert_eq!(files(&dst), files(&whole));
        fs::remove_dir_all(&dst).unwrap();
    }
}

#[test]
fn a_place_that_may_only_be_read_is_one_error() {
    let (source, out) = (Synthetic::default().folder(), TempDir::new().unwrap());
    let dst = out.path().join("dst");
    #[cfg(target_arch = "x86_64")]
    let calls = [libc::SYS_mkdir, libc::SYS_mkdirat];
    #[cfg(not(target_arch = "x86_64"))]
    let calls = [libc::SYS_mkdirat];
    let said: Vec<_> = calls.iter().map(|&call| outcome(source.path(), &dst, false, (call, libc::EROFS, 0))).collect();
    let refused = |said: &String| said.contains("cannot create") && said.contains("Read-only file system");
    assert!(said.iter().any(refused), "{said:?}");
}
