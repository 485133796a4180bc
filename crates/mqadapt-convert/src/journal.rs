//! What a conversion has done so far, one JSON line each, so that a killed one can be continued.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Error, Result, ShardRecord};

/// Its name in the working folder.
pub(crate) const JOURNAL_FILE: &str = "mqadapt.journal.jsonl";
/// Longest journal that is read: a line for every 256 MiB, and a hundred bytes for every merged tensor.
const MAX_JOURNAL_BYTES: u64 = 64 << 20;

/// A line after the first: how far a shard is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    /// The shard.
    pub shard: String,
    /// Its first so many bytes are written.
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

/// What the journal of an unfinished conversion says.
#[derive(Debug, Default)]
pub(crate) struct Past {
    layers: Option<String>,
    /// By index.
    merged: BTreeMap<usize, LayerLine>,
    /// The marks of each shard, in order.
    marks: HashMap<String, Vec<Mark>>,
}

impl Past {
    /// The marks of a shard, in order.
    pub fn marks(&self, shard: &str) -> &[Mark] {
        self.marks.get(shard).map_or(&[], Vec::as_slice)
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
    sync: bool,
}

impl Journal {
    /// Starts a journal with what is being done, or continues the one that is there.
    pub fn open(folder: &Path, job: &Value, resume: bool, sync: bool) -> Result<(Self, Past)> {
        let path = folder.join(JOURNAL_FILE);
        let past = if resume { read(folder, &path, job)? } else { None };
        let mut options = OpenOptions::new();
        options.create(true).write(true);
        let file = if past.is_some() { options.append(true) } else { options.truncate(true) }.open(&path);
        let mut journal = Self { file: file.map_err(Error::io("create", &path))?, path, sync };
        if past.is_some() {
            // the last line may be torn: begin a new one
            journal.file.write_all(b"\n").map_err(Error::io("write", &journal.path))?;
        } else {
            journal.line(job)?;
        }
        Ok((journal, past.unwrap_or_default()))
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
        let text = serde_json::to_string(line).unwrap_or_default() + "\n";
        self.file.write_all(text.as_bytes()).map_err(Error::io("write", &self.path))?;
        if self.sync { self.file.sync_data().map_err(Error::io("write", &self.path)) } else { Ok(()) }
    }
}

/// Reads a journal; `None` where there is none, or not a whole first line: nothing was done then.
fn read(folder: &Path, path: &Path, job: &Value) -> Result<Option<Past>> {
    let mut text = Vec::new();
    match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io("open", path)(error)),
        Ok(file) => file.take(MAX_JOURNAL_BYTES).read_to_end(&mut text).map_err(Error::io("read", path))?,
    };
    let mut lines = text.split(|byte| *byte == b'\n');
    let Some(found) = lines.next().and_then(|line| serde_json::from_slice::<Value>(line).ok()) else { return Ok(None) };
    if let Some(difference) = difference(&found, job) {
        return Err(Error::OtherConversion { path: folder.to_owned(), difference });
    }
    let mut past = Past::default();
    for line in lines {
        if let Ok(mark) = serde_json::from_slice::<Mark>(line) {
            past.marks.entry(mark.shard.clone()).or_default().push(mark);
        } else if let Ok(layers) = serde_json::from_slice::<Layers>(line) {
            past.layers = Some(layers.layers_xxh3_128);
        } else if let Ok(layer) = serde_json::from_slice::<LayerLine>(line) {
            past.merged.insert(layer.layer_idx, layer);
        }
    }
    Ok(Some(past))
}

/// The first field in which two jobs differ.
fn difference(found: &Value, wanted: &Value) -> Option<String> {
    let (Some(found), Some(wanted)) = (found.as_object(), wanted.as_object()) else {
        return Some("its kind".to_owned());
    };
    let fields = found.keys().chain(wanted.keys());
    let field = fields.into_iter().find(|field| found.get(*field) != wanted.get(*field))?;
    let brief = |value: Option<&Value>| {
        let text = value.map_or_else(|| "nothing".to_owned(), Value::to_string);
        text.char_indices().nth(60).map_or(text.clone(), |(end, _)| format!("{}...", &text[..end]))
    };
    Some(format!("its {field} is {}, not {}", brief(found.get(field)), brief(wanted.get(field))))
}
