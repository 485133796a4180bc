//! What a conversion has done so far, one JSON line each, so that a killed one can be continued.
//!
//! Every line ends in its number and a checksum of what is before. A line that does not have them, and what follows it, is
//! not believed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use crate::folder::directory::Directory;
use crate::{Error, Result, ShardRecord};

/// Its name in the working folder.
pub(crate) const JOURNAL_FILE: &str = "mqadapt.journal.jsonl";
/// Longest journal that is read: a line for every 256 MiB, and a hundred bytes for every merged tensor.
const MAX_JOURNAL_BYTES: u64 = 64 << 20;
/// The field that ends every line: its checksum.
const CHECKSUM: &str = "line_xxh3_64";
/// The field before it: its number, from 0.
const NUMBER: &str = "line";

/// A line after the first: how far a shard is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    /// The shard.
    pub shard: String,
    /// Where the mark before it ends; 0 for the first. Marks beyond that are of a file that was damaged, and do not count.
    pub from: u64,
    /// The number of bytes that are written.
    pub bytes: u64,
    /// XXH3 (128 bits) of them.
    pub xxh3_128: String,
    /// It is complete, and has its final name.
    pub complete: bool,
    /// The fingerprint's samples of source shards that were completed, after the mark before: number and hash.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub samples: Vec<(usize, String)>,
    /// The merged tensors that end in these bytes, after the mark before.
    pub merged: Vec<MergedTensor>,
}

impl Mark {
    /// What the manifest says of a complete shard.
    pub fn record(&self) -> ShardRecord {
        ShardRecord { name: self.shard.clone(), bytes: self.bytes, xxh3_128: self.xxh3_128.clone() }
    }
}

/// What was learnt between two marks.
#[derive(Debug, Default)]
pub(crate) struct Learnt {
    pub samples: Vec<(usize, String)>,
    pub merged: Vec<MergedTensor>,
}

/// The error of a merged tensor: the bits of the two sums, because decimal numbers may not come back exactly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MergedTensor {
    pub layer_idx: usize,
    pub error_bits: u64,
    pub energy_bits: u64,
}

/// A line for a method that gives whole layers: XXH3 (128 bits) of what it gave.
#[derive(Debug, Serialize, Deserialize)]
struct Layers {
    layers_xxh3_128: String,
}

/// A line for each layer that such a method gave, once it is in its place.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LayerLine {
    pub layer_idx: usize,
    /// XXH3 (128 bits) of its tensors as they are stored, in the order of their places.
    pub layer_xxh3_128: String,
    pub relative_error_bits: u64,
    pub notes: Value,
}

/// A line for the names of all files that the conversion writes: what may be removed when it starts again.
#[derive(Debug, Serialize, Deserialize)]
struct Files {
    files: Vec<String>,
}

/// What the journal of an unfinished conversion says.
#[derive(Debug, Default)]
pub(crate) struct Past {
    layers: Option<String>,
    /// By index.
    merged: BTreeMap<usize, LayerLine>,
    /// The marks of each shard, in order.
    marks: HashMap<String, Vec<Mark>>,
    files: Vec<String>,
    /// Lines that are believed, and their bytes.
    lines: usize,
    bytes: u64,
    /// What is wrong with the journal, in a sentence.
    damage: Option<String>,
}

impl Past {
    /// The marks of a shard, in order.
    pub fn marks(&self, shard: &str) -> &[Mark] {
        self.marks.get(shard).map_or(&[], Vec::as_slice)
    }

    /// What is wrong with the journal, in a sentence.
    pub fn damage(&self) -> Option<&str> {
        self.damage.as_deref()
    }

    fn take(&mut self, line: Value) {
        if let Ok(mark) = Mark::deserialize(&line) {
            let marks = self.marks.entry(mark.shard.clone()).or_default();
            marks.retain(|before| before.bytes <= mark.from);
            marks.push(mark);
        } else if let Ok(layers) = Layers::deserialize(&line) {
            self.layers = Some(layers.layers_xxh3_128);
        } else if let Ok(layer) = LayerLine::deserialize(&line) {
            self.merged.insert(layer.layer_idx, layer);
        } else if let Ok(files) = serde_json::from_value::<Files>(line) {
            self.files = files.files;
        }
    }

    /// What is known of a layer that a layer method gave.
    pub fn layer(&self, layer_idx: usize) -> Option<&LayerLine> {
        self.merged.get(&layer_idx)
    }
}

/// The journal, open for adding lines.
#[derive(Debug)]
pub(crate) struct Journal {
    file: File,
    path: PathBuf,
    lines: usize,
    sync: bool,
}

impl Journal {
    /// Starts a journal with what is being done and the files that it writes, or continues the one that is there.
    pub fn open(folder: &Directory, job: &Value, files: &[String], resume: bool, sync: bool) -> Result<(Self, Past)> {
        let path = folder.path().join(JOURNAL_FILE);
        let past = if resume { read(folder, &path, job)? } else { None };
        let Some(past) = past else {
            folder.remove(JOURNAL_FILE)?;
            let mut journal = Self { file: folder.create(JOURNAL_FILE)?, path, lines: 0, sync };
            journal.line(job)?;
            journal.line(&Files { files: files.to_vec() })?;
            if sync {
                folder.sync()?; // no file is there without it, after a power failure either
            }
            return Ok((journal, Past::default()));
        };
        let mut file = folder.open_or_create(JOURNAL_FILE)?;
        file.set_len(past.bytes).map_err(Error::io("write", &path))?;
        file.seek(SeekFrom::End(0)).map_err(Error::io("write", &path))?;
        let mut journal = Self { file, path, lines: past.lines, sync };
        if past.files != files {
            journal.line(&Files { files: files.to_vec() })?;
        }
        Ok((journal, past))
    }

    /// Adds a mark.
    pub fn mark(&mut self, mark: &Mark) -> Result<()> {
        self.line(mark)
    }

    /// Notes a layer that is in its place.
    pub fn layer(&mut self, line: &LayerLine) -> Result<()> {
        self.line(line)
    }

    /// Notes what a layer method gave; fails if `past` had something else, which is in the completed files.
    pub fn layers(&mut self, folder: &Path, past: &Past, xxh3_128: &str) -> Result<()> {
        if past.layers.as_deref().is_some_and(|before| before != xxh3_128) {
            let difference = "its merged layers are others: another calibration text or other options".to_owned();
            return Err(Error::OtherConversion { path: folder.to_owned(), difference });
        }
        self.line(&Layers { layers_xxh3_128: xxh3_128.to_owned() })
    }

    fn line<T: Serialize>(&mut self, line: &T) -> Result<()> {
        let text = numbered(&serde_json::to_string(line).unwrap_or_default(), self.lines);
        self.lines += 1;
        self.file.write_all(text.as_bytes()).map_err(Error::io("write", &self.path))?;
        if self.sync { self.file.sync_data().map_err(Error::io("write", &self.path)) } else { Ok(()) }
    }
}

/// An object as a line of the journal.
fn numbered(object: &str, number: usize) -> String {
    let object = object.strip_suffix('}').unwrap_or(object);
    let line = format!("{object},\"{NUMBER}\":{number}");
    let checksum = xxh3_64(line.as_bytes());
    format!("{line},\"{CHECKSUM}\":\"{checksum:016x}\"}}\n")
}

/// What a line says; `None` unless its checksum and its number are right.
fn checked(line: &[u8], number: usize) -> Option<Value> {
    let value = intact(line)?;
    (value.get(NUMBER).and_then(Value::as_u64) == Some(number as u64)).then_some(value)
}

/// What a line says; `None` unless its checksum is right.
fn intact(line: &[u8]) -> Option<Value> {
    let end = format!(",\"{CHECKSUM}\":\"0123456789abcdef\"}}").len();
    let (said, checksum) = line.split_at_checked(line.len().checked_sub(end)?)?;
    let expected = format!(",\"{CHECKSUM}\":\"{:016x}\"}}", xxh3_64(said));
    (checksum == expected.as_bytes()).then(|| serde_json::from_slice(line).ok())?
}

/// The files that a journal says are written beside it, and itself. Lines count one by one: what is damaged elsewhere in it
/// does not change whose files they are.
pub(crate) fn files_beside(folder: &Directory) -> Result<HashSet<String>> {
    let Some(text) = folder.read_small(JOURNAL_FILE, MAX_JOURNAL_BYTES)? else { return Ok(HashSet::new()) };
    let lines = text.split(|byte| *byte == b'\n').filter_map(intact);
    let named = lines.filter_map(|line| serde_json::from_value::<Files>(line).ok());
    Ok(named.flat_map(|line| line.files).chain([JOURNAL_FILE.to_owned()]).collect())
}

/// Whether a journal is of this job.
pub(crate) fn is_of(folder: &Directory, job: &Value) -> Result<bool> {
    let text = folder.read_small(JOURNAL_FILE, MAX_JOURNAL_BYTES)?.unwrap_or_default();
    let first = text.split(|byte| *byte == b'\n').next().and_then(|line| checked(line, 0));
    Ok(first.is_some_and(|found| difference(&found, job).is_none()))
}

/// Takes a journal away from the result, which becomes public; what it said, to put it back.
pub(crate) fn take(folder: &Directory) -> Result<Vec<u8>> {
    let text = folder.read_small(JOURNAL_FILE, u64::MAX)?.unwrap_or_default();
    folder.remove(JOURNAL_FILE)?;
    Ok(text)
}

/// Puts back what [`take`] took.
pub(crate) fn put_back(folder: &Directory, text: &[u8]) -> Result<()> {
    let path = folder.path().join(JOURNAL_FILE);
    folder.create(JOURNAL_FILE)?.write_all(text).map_err(Error::io("write", &path))
}

/// Reads a journal; `None` where there is none, or not a whole first line: nothing was done then.
fn read(folder: &Directory, path: &Path, job: &Value) -> Result<Option<Past>> {
    let Some(text) = folder.read_small(JOURNAL_FILE, MAX_JOURNAL_BYTES)? else { return Ok(None) };
    // a line without its end was torn by a kill
    let mut lines = text.split_inclusive(|byte| *byte == b'\n').filter_map(|line| line.strip_suffix(b"\n")).enumerate();
    let Some((_, first)) = lines.next() else { return Ok(None) };
    let Some(found) = checked(first, 0) else {
        let detail = "its first line is damaged, or of an earlier build (its checksum is missing or wrong)".to_owned();
        return Err(Error::Journal { path: path.to_owned(), detail });
    };
    if let Some(difference) = difference(&found, job) {
        return Err(Error::OtherConversion { path: folder.path().to_owned(), difference });
    }
    let mut past = Past { lines: 1, bytes: first.len() as u64 + 1, ..Past::default() };
    for (number, line) in lines {
        let Some(value) = checked(line, number) else {
            let what = "is damaged (its checksum is wrong); what it and the lines after it say is done again";
            past.damage = Some(format!("{}: line {} {what}", path.display(), number + 1));
            break;
        };
        past.take(value);
        past.lines += 1;
        past.bytes += line.len() as u64 + 1;
    }
    Ok(Some(past))
}

/// The first field in which two jobs differ.
fn difference(found: &Value, wanted: &Value) -> Option<String> {
    let (Some(found), Some(wanted)) = (found.as_object(), wanted.as_object()) else {
        return Some("its kind".to_owned());
    };
    let mut fields = found.keys().chain(wanted.keys()).filter(|field| ![NUMBER, CHECKSUM].contains(&field.as_str()));
    let field = fields.find(|field| found.get(*field) != wanted.get(*field))?;
    let brief = |value: Option<&Value>| {
        let text = value.map_or_else(|| "nothing".to_owned(), Value::to_string);
        text.char_indices().nth(60).map_or(text.clone(), |(end, _)| format!("{}...", &text[..end]))
    };
    Some(format!("its {field} is {}, not {}", brief(found.get(field)), brief(wanted.get(field))))
}
