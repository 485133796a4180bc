//! What a conversion does with files and folders that are not its own: nothing is removed, followed or written to.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use mqadapt_checkpoint::Checkpoint;
use mqadapt_compress::{MergeOptions, method};
use mqadapt_convert::{ConversionReport, ConvertOptions, Error, MANIFEST_FILE, PARTIAL_SUFFIX, convert};
use mqadapt_core::{Interrupted, NoProgress, Plan, Progress};
use tempfile::TempDir;

use crate::synthetic::{Synthetic, files};

const JOURNAL: &str = "mqadapt.journal.jsonl";

fn options() -> ConvertOptions {
    ConvertOptions { sync: false, ..ConvertOptions::new(method("mean").unwrap(), MergeOptions::default()) }
}

fn overwrite() -> ConvertOptions {
    ConvertOptions { overwrite: true, ..options() }
}

fn resume() -> ConvertOptions {
    ConvertOptions { resume: true, ..options() }
}

/// A source of several files, a place for the output, and what that is when nothing goes wrong.
struct Place {
    source: TempDir,
    out: TempDir,
    expected: Vec<(PathBuf, Vec<u8>)>,
}

impl Place {
    fn new() -> Self {
        let source = Synthetic { per_shard: 12, ..Synthetic::default() }.folder();
        let place = Self { source, out: TempDir::new().unwrap(), expected: Vec::new() };
        place.run(&options(), &NoProgress).unwrap();
        let expected = files(&place.dst());
        fs::remove_dir_all(place.dst()).unwrap();
        Self { expected, ..place }
    }

    fn dst(&self) -> PathBuf {
        self.out.path().join("dst")
    }

    fn partial(&self) -> PathBuf {
        self.out.path().join(format!("dst{PARTIAL_SUFFIX}"))
    }

    fn to(&self, dst: &Path, options: &ConvertOptions, progress: &dyn Progress) -> Result<ConversionReport, Error> {
        let checkpoint = Checkpoint::open(self.source.path())?;
        let plan = Plan::parse("gqa2:0; mqa:last2", checkpoint.config()).unwrap();
        convert(&checkpoint, dst, &plan, options, progress)
    }

    fn run(&self, options: &ConvertOptions, progress: &dyn Progress) -> Result<ConversionReport, Error> {
        self.to(&self.dst(), options, progress)
    }

    /// The error of a conversion that is refused and changes nothing. It says these words.
    fn refused(&self, options: &ConvertOptions, words: &[&str]) {
        let before = content(self.out.path());
        let error = self.run(options, &NoProgress).unwrap_err().to_string();
        assert!(words.iter().all(|word| error.contains(word)), "{words:?}: {error}");
        assert_eq!(content(self.out.path()), before, "{error}");
    }

    /// Everything of a conversion except for its name, which something else has got meanwhile.
    fn finished_but_for_its_name(&self) {
        let appear = Meanwhile::new(|| fs::write(self.dst(), "in the way").unwrap());
        self.run(&resume(), &appear).unwrap_err();
        fs::remove_file(self.dst()).unwrap();
    }

    fn assert_resumes(&self) -> ConversionReport {
        let report = self.run(&resume(), &NoProgress).unwrap();
        assert_eq!(files(&self.dst()), self.expected);
        assert!(!self.partial().exists());
        report
    }
}

/// Files, folders and links below a folder; links are not followed.
fn content(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut out = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let about = path.symlink_metadata().unwrap();
        if about.is_symlink() {
            out.push((path.clone(), format!("to {}", fs::read_link(&path).unwrap().display())));
        } else if about.is_dir() {
            out.push((path.clone(), "folder".to_owned()));
            out.extend(content(&path));
        } else {
            let bytes = if about.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            out.push((path, format!("{} {bytes:?}", about.ino())));
        }
    }
    out.sort();
    out
}

/// Does something once, in the middle of the conversion.
struct Meanwhile<F: Fn()>(F, AtomicBool);

impl<F: Fn()> Meanwhile<F> {
    fn new(act: F) -> Self {
        Self(act, AtomicBool::new(false))
    }
}

// SAFETY: only the thread that converts reports progress
unsafe impl<F: Fn()> Sync for Meanwhile<F> {}

impl<F: Fn()> Progress for Meanwhile<F> {
    fn advance(&self, _: &str, done: u64, total: u64) -> Result<(), Interrupted> {
        if done > total / 3 && !self.1.swap(true, Ordering::Relaxed) {
            (self.0)();
        }
        Ok(())
    }
}

#[test]
fn overwrite_refuses_whatever_no_manifest_lists() {
    let place = Place::new();
    let dst = place.dst();
    for name in ["config.json", "model.safetensors.index.json", "thesis.txt"] {
        fs::create_dir(&dst).unwrap();
        fs::write(dst.join(name), "{}").unwrap();
        place.refused(&overwrite(), &[name, "is not overwritten"]);
        fs::remove_dir_all(&dst).unwrap();
    }
    place.run(&options(), &NoProgress).unwrap();
    let inner = dst.join("additional_chat_templates");
    let strangers: [(&str, &dyn Fn()); 6] = [
        ("optimizer.pt", &|| fs::write(dst.join("optimizer.pt"), "days").unwrap()),
        (".notes", &|| fs::write(dst.join(".notes"), "").unwrap()),
        ("runs/", &|| fs::create_dir(dst.join("runs")).unwrap()),
        ("additional_chat_templates/mine.jinja", &|| fs::write(inner.join("mine.jinja"), "").unwrap()),
        ("data", &|| symlink(place.source.path(), dst.join("data")).unwrap()),
        ("LICENSE (a symbolic link)", &|| {
            fs::remove_file(dst.join("LICENSE")).unwrap();
            symlink("/etc/passwd", dst.join("LICENSE")).unwrap();
        }),
    ];
    for (name, make) in strangers {
        make();
        place.refused(&overwrite(), &[name, "is not overwritten"]);
        let path = dst.join(name.split(' ').next().unwrap());
        if name.ends_with('/') { fs::remove_dir(path).unwrap() } else { fs::remove_file(path).unwrap() }
    }
    for number in 0..9 {
        fs::write(dst.join(format!("log{number}")), "").unwrap();
    }
    place.refused(&overwrite(), &["(log0, log1, log2, log3, log4 and 4 more)"]);
    (0..9).for_each(|number| fs::remove_file(dst.join(format!("log{number}"))).unwrap());
    place.run(&overwrite(), &NoProgress).unwrap(); // of the listed ones, LICENSE is missing
    assert_eq!(files(&dst), place.expected);
    fs::remove_dir_all(&dst).unwrap();
    fs::create_dir(&dst).unwrap();
    place.run(&overwrite(), &NoProgress).unwrap(); // an empty folder
    assert_eq!(files(&dst), place.expected);
    assert_eq!(fs::read_dir(place.out.path()).unwrap().count(), 1);
}

#[test]
fn a_manifest_lists_every_file_and_an_earlier_one_is_believed_as_far_as_it_is_certain() {
    let place = Place::new();
    let report = place.run(&options(), &NoProgress).unwrap();
    let there: Vec<_> = place.expected.iter().map(|(name, _)| name.to_str().unwrap().to_owned()).collect();
    assert_eq!(report.manifest.files, there);

    let manifest = place.dst().join(MANIFEST_FILE);
    let mut text: serde_json::Value = serde_json::from_slice(&fs::read(&manifest).unwrap()).unwrap();
    for listed in ["../victim", "/etc/passwd", ".git/config", "a/b/c", "", "x/"] {
        text["files"][0] = listed.into();
        fs::write(&manifest, text.to_string()).unwrap();
        place.refused(&overwrite(), &["is not overwritten", listed]);
    }
    text.as_object_mut().unwrap().remove("files");
    fs::write(&manifest, text.to_string()).unwrap();
    place.refused(&overwrite(), &["LICENSE", "additional_chat_templates/", "tokenizer.json"]);
    for name in ["LICENSE", "tokenizer.json", "additional_chat_templates/tool.jinja"] {
        fs::remove_file(place.dst().join(name)).unwrap();
    }
    fs::remove_dir(place.dst().join("additional_chat_templates")).unwrap();
    place.run(&overwrite(), &NoProgress).unwrap();
    assert_eq!(files(&place.dst()), place.expected);
}

#[test]
fn an_output_without_a_name_is_refused() {
    let place = Place::new();
    symlink("/", place.out.path().join("root")).unwrap();
    let (below, root) = (place.out.path().join("a/.."), place.out.path().join("root"));
    for dst in [Path::new(""), Path::new("."), Path::new(".."), Path::new("/"), Path::new("./."), &below, &root] {
        for options in [overwrite(), resume(), options()] {
            let error = place.to(dst, &options, &NoProgress).unwrap_err().to_string();
            assert!(error.contains("does not name a folder"), "{dst:?}: {error}");
        }
    }
    assert_eq!(fs::read_dir(place.out.path()).unwrap().count(), 1);
}

#[test]
fn what_appears_under_the_name_meanwhile_stays() {
    let place = Place::new();
    let dst = place.dst();
    let appearing: [&dyn Fn(); 4] = [
        &|| fs::write(&dst, "a file").unwrap(),
        &|| fs::create_dir(&dst).unwrap(),
        &|| place.to(&dst, &ConvertOptions { resume: false, ..options() }, &NoProgress).map_or((), drop),
        &|| symlink("nowhere", &dst).unwrap(),
    ];
    for (number, appear) in appearing.into_iter().enumerate() {
        for options in [options(), overwrite(), resume()] {
            let appear = || {
                appear();
                if number == 2 {
                    fs::create_dir(&dst).unwrap(); // the second conversion found the folder locked
                    fs::write(dst.join("config.json"), "{}").unwrap();
                }
            };
            let error = place.run(&options, &Meanwhile::new(appear)).unwrap_err().to_string();
            assert!(error.contains("appeared while") && error.contains("--resume"), "{error}");
            let left = content(place.out.path());
            assert!(left.iter().any(|(path, _)| *path == dst), "{left:?}");
            assert!(number != 2 || fs::read(dst.join("config.json")).unwrap() == b"{}");
            assert!(fs::remove_file(&dst).is_ok() || fs::remove_dir_all(&dst).is_ok());
            place.assert_resumes();
            fs::remove_dir_all(&dst).unwrap();
        }
    }
}

#[test]
fn what_appears_in_a_folder_that_is_replaced_stays() {
    let place = Place::new();
    let dst = place.dst();
    let old = place.out.path().join("moved");
    let changes: [&dyn Fn(); 3] = [
        &|| fs::write(dst.join("results.csv"), "new").unwrap(),
        &|| fs::write(dst.join("additional_chat_templates/new"), "new").unwrap(),
        &|| {
            fs::rename(&dst, &old).unwrap();
            fs::create_dir(&dst).unwrap();
            fs::write(dst.join("config.json"), "new").unwrap();
        },
    ];
    for change in changes {
        place.run(&options(), &NoProgress).unwrap();
        let before = files(&dst).len();
        let error = place.run(&overwrite(), &Meanwhile::new(change)).unwrap_err().to_string();
        assert!(error.contains("while the conversion ran") && error.contains("--resume"), "{error}");
        let (now, moved) = (files(&dst), if old.exists() { files(&old).len() } else { before });
        assert!(now.iter().any(|(_, bytes)| bytes == b"new") && moved == before, "{error}");
        assert!(now.len() == before + 1 || old.exists());
        fs::remove_dir_all(&dst).unwrap();
        place.assert_resumes();
        fs::remove_dir_all(&dst).unwrap();
    }
}

#[test]
fn a_working_folder_that_is_a_link_is_not_followed() {
    let place = Place::new();
    let victim = place.out.path().join("victim");
    fs::create_dir(&victim).unwrap();
    fs::write(victim.join("thesis.txt"), "years of work").unwrap();
    for target in [victim.as_path(), Path::new("nowhere"), &victim.join("thesis.txt")] {
        symlink(target, place.partial()).unwrap();
        for options in [overwrite(), resume(), options()] {
            place.refused(&options, &["dst.mqadapt-partial", "is a symbolic link"]);
        }
        fs::remove_file(place.partial()).unwrap();
    }
}

#[test]
fn a_working_folder_of_the_user_is_not_emptied() {
    let place = Place::new();
    fs::create_dir(place.partial()).unwrap();
    place.assert_resumes(); // an empty one is as good as none
    fs::remove_dir_all(place.dst()).unwrap();
    for name in ["notes.txt", "model.safetensors", "config.json", "mqadapt.json"] {
        fs::create_dir(place.partial()).unwrap();
        fs::write(place.partial().join(name), "mine").unwrap();
        for options in [overwrite(), resume(), options()] {
            place.refused(&options, &[name, "no conversion is known to have written"]);
        }
        fs::remove_dir_all(place.partial()).unwrap();
    }
    // nor what the user puts into one of ours
    place.finished_but_for_its_name();
    fs::write(place.partial().join("notes.txt"), "mine").unwrap();
    for options in [overwrite(), resume(), options()] {
        place.refused(&options, &["(notes.txt)", "no conversion is known to have written"]);
    }
    fs::remove_file(place.partial().join("notes.txt")).unwrap();
    place.run(&overwrite(), &NoProgress).unwrap();
    assert_eq!(files(&place.dst()), place.expected);
}

#[test]
fn a_failed_conversion_removes_only_what_it_wrote() {
    let place = Place::new();
    let shard = place.source.path().join("model-00001-of-00004.safetensors");
    let disturb = || {
        fs::write(place.partial().join("notes.txt"), "mine").unwrap();
        let file = fs::OpenOptions::new().write(true).open(&shard).unwrap();
        file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    };
    let error = place.run(&options(), &Meanwhile::new(disturb)).unwrap_err();
    assert!(matches!(error, Error::SourceChanged { .. }), "{error}");
    assert_eq!(files(place.out.path()), [(PathBuf::from("dst.mqadapt-partial/notes.txt"), b"mine".to_vec())]);
}

/// What is planted: a name in the working folder, what it is called, and how it is made.
type Plant<'a> = (&'a str, &'a str, &'a dyn Fn(&Path));

#[test]
fn links_in_a_working_folder_are_not_followed() {
    let place = Place::new();
    let (victim, elsewhere) = (place.out.path().join("victim"), TempDir::new().unwrap());
    fs::write(&victim, "years of work").unwrap();
    fs::write(elsewhere.path().join("tool.jinja"), "mine").unwrap();
    place.finished_but_for_its_name();
    let inside = |name: &str| place.partial().join(name);
    let aside = place.out.path().join("aside");
    let shard = "model-00002-of-00004.safetensors";
    let unfinished = format!("{shard}.partial");
    let planted: [Plant<'_>; 6] = [
        (shard, "a symbolic link", &|path| symlink(&victim, path).unwrap()),
        (&unfinished, "a symbolic link", &|path| symlink(&victim, path).unwrap()),
        (&unfinished, "a hard link", &|path| fs::hard_link(&victim, path).unwrap()),
        (JOURNAL, "a symbolic link", &|path| symlink(&aside, path).unwrap()),
        (JOURNAL, "not a regular file", &|path| {
            assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
        }),
        ("additional_chat_templates", "additional_chat_templates", &|path| symlink(elsewhere.path(), path).unwrap()),
    ];
    for (name, words, plant) in planted {
        let before = inside(name).exists();
        if before {
            fs::rename(inside(name), &aside).unwrap();
        }
        plant(&inside(name));
        for options in [resume(), overwrite()] {
            place.refused(&options, &[name.split('.').next().unwrap(), words]);
        }
        fs::remove_file(inside(name)).unwrap();
        if before {
            fs::rename(&aside, inside(name)).unwrap();
        }
    }
    place.assert_resumes();
    assert_eq!(fs::read(&victim).unwrap(), b"years of work");
    assert_eq!(files(elsewhere.path()).len(), 1);
}

#[test]
fn another_users_working_folder_or_files_are_not_adopted() {
    let place = Place::new();
    place.finished_but_for_its_name();
    if chown(place.partial(), Some(1234), None).is_err() {
        println!("skipped: only root gives files to another user");
        return;
    }
    for options in [resume(), overwrite(), options()] {
        place.refused(&options, &["dst.mqadapt-partial", "belongs to another user", "1234"]);
    }
    chown(place.partial(), Some(0), None).unwrap();
    let shard = place.partial().join("model-00002-of-00004.safetensors");
    for path in [shard, place.partial().join(JOURNAL), place.partial().join("additional_chat_templates")] {
        chown(&path, Some(1234), None).unwrap();
        for options in [resume(), overwrite()] {
            place.refused(&options, &["of another user"]);
        }
        chown(&path, Some(0), None).unwrap();
    }
    place.assert_resumes();
}

/// The shards that are complete in the working folder.
fn shards(place: &Place) -> Vec<PathBuf> {
    let names = fs::read_dir(place.partial()).unwrap().map(|entry| entry.unwrap().path());
    let mut out: Vec<_> = names.filter(|path| path.extension().is_some_and(|e| e == "safetensors")).collect();
    out.sort();
    out
}

#[test]
fn a_damaged_complete_shard_is_written_again() {
    let place = Place::new();
    let damages: [fn(&mut Vec<u8>); 4] = [
        |bytes| *bytes.last_mut().unwrap() ^= 1,
        |bytes| bytes[20] ^= 1,
        |bytes| bytes.extend(b"more"),
        |bytes| bytes.truncate(bytes.len() / 2),
    ];
    for damage in damages {
        place.finished_but_for_its_name();
        let complete = shards(&place);
        assert_eq!(complete.len(), 4);
        let mut bytes = fs::read(&complete[2]).unwrap();
        damage(&mut bytes);
        fs::write(&complete[2], bytes).unwrap();
        let report = place.assert_resumes();
        assert_eq!(report.redone.len(), 1, "{:?}", report.redone);
        assert!(report.redone[0].contains("model-00003-of-00004.safetensors: is damaged"), "{:?}", report.redone);
        fs::remove_dir_all(place.dst()).unwrap();
    }
    place.finished_but_for_its_name();
    assert!(place.assert_resumes().redone.is_empty());
}

#[test]
fn a_journal_with_flipped_digits_is_not_believed() {
    let place = Place::new();
    place.finished_but_for_its_name();
    let journal = place.partial().join(JOURNAL);
    let whole = fs::read_to_string(&journal).unwrap();
    let lines = whole.lines().count();
    assert!(lines >= 6, "{whole}");
    fs::remove_dir_all(place.partial()).unwrap();
    for number in 0..lines {
        // every digit position would take long: a few, spread over the line
        for part in [3, 2] {
            place.finished_but_for_its_name();
            let mut text: Vec<String> = fs::read_to_string(&journal).unwrap().lines().map(str::to_owned).collect();
            let digits: Vec<_> = text[number].match_indices(|c: char| c.is_ascii_digit()).map(|(at, _)| at).collect();
            let at = digits[digits.len() / part];
            let flipped = if &text[number][at..=at] == "1" { "2" } else { "1" };
            text[number].replace_range(at..=at, flipped);
            fs::write(&journal, text.join("\n") + "\n").unwrap();
            if number == 0 {
                place.refused(&resume(), &[JOURNAL, "its first line is damaged", "--overwrite starts again"]);
                place.run(&overwrite(), &NoProgress).unwrap();
                assert_eq!(files(&place.dst()), place.expected);
            } else {
                let redone = place.assert_resumes().redone;
                let said = format!("{JOURNAL}: line {} is damaged", number + 1);
                assert!(redone.len() == 1 && redone[0].contains(&said), "{redone:?}");
            }
            fs::remove_dir_all(place.dst()).unwrap();
        }
    }
    // a line that is missing
    place.finished_but_for_its_name();
    let text: Vec<_> = whole.lines().enumerate().filter(|(at, _)| *at != 3).map(|(_, line)| line).collect();
    fs::write(&journal, text.join("\n") + "\n").unwrap();
    assert!(place.assert_resumes().redone[0].contains("line 4 is damaged"));
}

#[test]
fn a_journal_of_an_earlier_build_is_refused() {
    let place = Place::new();
    place.finished_but_for_its_name();
    let journal = place.partial().join(JOURNAL);
    let text = fs::read_to_string(&journal).unwrap();
    let plain: Vec<_> = text.lines().map(|line| format!("{}}}\n", line.split(",\"line\":").next().unwrap())).collect();
    fs::write(&journal, plain.concat()).unwrap();
    place.refused(&resume(), &["no conversion is known to have written"]);
    for shard in shards(&place) {
        fs::remove_file(shard).unwrap();
    }
    for (name, _) in files(&place.partial()).into_iter().filter(|(name, _)| name.to_str() != Some(JOURNAL)) {
        fs::remove_file(place.partial().join(name)).unwrap();
    }
    fs::remove_dir(place.partial().join("additional_chat_templates")).unwrap();
    place.refused(&resume(), &[JOURNAL, "of an earlier build"]);
}

/// Killed after the journal went and before the folder had its name, or before the old folder was removed.
#[test]
fn a_complete_working_folder_without_a_journal_is_begun_again() {
    for options in [resume(), overwrite()] {
        let place = Place::new();
        place.finished_but_for_its_name();
        fs::remove_file(place.partial().join(JOURNAL)).unwrap();
        place.run(&options, &NoProgress).unwrap();
        assert_eq!(files(&place.dst()), place.expected);
        assert!(!place.partial().exists());
    }
}
