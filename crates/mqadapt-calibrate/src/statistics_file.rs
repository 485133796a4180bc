//! Statistics of a whole model in one safetensors file: collected once, merged from hundreds of times.
//!
//! Tensors are `layers.{i}.{moment}` (f64) and `layers.{i}.inputs.{n}` (f32); the metadata says of which model and text
//! they are, and has a hash of each tensor, of the weights that each layer's statistics come from, and of the header itself.
//! Written layer by layer to a temporary file that takes its name, if it is still free, when it is complete; read one layer
//! at a time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use mqadapt_checkpoint::{Checkpoint, Header, HeaderEntry, MAX_HEADER_BYTES, Shard, open_regular};
use mqadapt_compress::{LayerStatistics, Moment, NamedTensors, Needs, StatisticsShape};
use mqadapt_core::AttentionShape;
use mqadapt_core::family::{EMBED_TOKENS, LayerTensor};
use mqadapt_core::{Progress, Progressing};
use serde_json::{Map, Value, json};
use tempfile::NamedTempFile;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use crate::calibration::{Calibration, LayerSample};
use crate::collector::{Collector, block_heads};
use crate::weights::attention;
use crate::{Error, Result};
use mqadapt_model::Spill;
use mqadapt_model::{CALIBRATE, LayerTrace, StreamedLayer, embed};

/// `format` of the metadata; the number changes when the meaning of a tensor does, or how it is computed.
const FORMAT: &str = "mqadapt-statistics-4";
/// Metadata: XXH3 (128 bits) of the rest of the header.
const HEADER_HASH: &str = "xxh3_128";
/// Metadata: [`Checkpoint::weights_digest`] of the embedding.
const EMBEDDING_WEIGHTS: &str = "weights.embed_tokens";
/// As long as every hash; in the header until the hashes are known.
const UNKNOWN: &str = "00000000000000000000000000000000";

/// Any method may be given the file.
const EVERYTHING: Needs = Needs { moments: &Moment::ALL, inputs: true };

/// Saved statistics, opened and checked.
#[derive(Debug)]
pub struct StatisticsFile {
    path: PathBuf,
    file: File,
    data_start: u64,
    entries: BTreeMap<String, HeaderEntry>,
    metadata: BTreeMap<String, String>,
    /// Layers whose weights are known to be those of the statistics, from layer 0 on; after the embedding.
    checked: AtomicUsize,
}

/// Metadata: [`Checkpoint::weights_digest`] of a layer.
fn layer_weights(layer_idx: usize) -> String {
    format!("weights.layers.{layer_idx}")
}

/// Metadata: XXH3 (128 bits) of a tensor of the file.
fn values(tensor: &str) -> String {
    format!("xxh3_128.{tensor}")
}

/// The hashes that a header has once they are known.
type Hashes = BTreeMap<String, String>;

impl Calibration {
    /// Names the text: its token ids and windows, as 16 hexadecimal digits. Target contexts are no part of it.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        let mut hash = Xxh3::new();
        for sequence in &self.sequences {
            hash.update(&(sequence.len() as u64).to_le_bytes());
            for id in sequence {
                hash.update(&id.to_le_bytes());
            }
        }
        format!("{:016x}", hash.digest())
    }
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> Error + '_ {
    move |source| Error::Io { path: path.to_owned(), source }
}

/// One pass over the text: the statistics of every layer, written to `path`. The residual stream goes to a file where it is
/// more than `spill` allows. Progress: layers, phase `calibrate`.
///
/// # Errors
/// [`Error::Argument`] for a target context longer than every sequence; [`Error::Io`] where the file cannot be written; as
/// running the model.
pub fn collect_statistics(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    path: &Path,
    spill: Option<&Spill>,
    progress: &dyn Progress,
) -> Result<StatisticsFile> {
    calibration.check_target_contexts(&calibration.lengths())?;
    let config = checkpoint.config();
    let written = (|| -> Result<()> {
        let mut hashes = Hashes::new();
        let (header, data_bytes) = layout(checkpoint, calibration, &hashes)?;
        let (file, partial) = unfinished(path)?.into_parts();
        let mut out = BufWriter::with_capacity(1 << 20, Hashing { file, hash: Xxh3::new() });
        out.write_all(&header).and_then(|()| next_hash(&mut out).map(drop)).map_err(failed(&partial))?;
        hashes.insert(EMBEDDING_WEIGHTS.to_owned(), checkpoint.weights_digest([EMBED_TOKENS])?);
        let bytes = 4 * config.hidden_size * calibration.sequences.iter().map(Vec::len).sum::<usize>();
        let folder = spill.filter(|spill| bytes as u64 > spill.max_memory).map(|spill| spill.folder.as_path());
        let mut hidden = embed(checkpoint, &calibration.sequences, folder)?;
        for layer_idx in 0..config.num_hidden_layers {
            let layer = StreamedLayer::load(checkpoint, layer_idx, progress)?;
            // they have just been read: this reads them from memory
            hashes.insert(layer_weights(layer_idx), checkpoint.weights_digest(names_of(checkpoint, layer_idx))?);
            let geometry = attention(config, layer_idx)?;
            let progressing = layer.progressing(progress);
            let mut collector =
                Collector::new(&geometry, &layer.o_proj(checkpoint)?, calibration, layer_idx, 1, EVERYTHING)?;
            let mut collect = |trace: &LayerTrace<'_>| collector.add(trace, &progressing);
            layer.run_observed(&mut hidden, &mut collect, progress)?;
            let sample = collector.finish();
            let mut hash = |name: String, out: &mut BufWriter<Hashing>| -> Result<()> {
                hashes.insert(values(&format!("layers.{layer_idx}.{name}")), next_hash(out).map_err(failed(&partial))?);
                Ok(())
            };
            for (name, (_, values)) in sample.statistics.to_tensors() {
                progressing.tell()?;
                values.iter().try_for_each(|v| out.write_all(&v.to_le_bytes())).map_err(failed(&partial))?;
                hash(name, &mut out)?;
            }
            for (n, input) in sample.inputs.iter().enumerate() {
                input.iter().try_for_each(|v| out.write_all(&v.to_le_bytes())).map_err(failed(&partial))?;
                hash(format!("inputs.{n}"), &mut out)?;
            }
        }
        let file = out.into_inner().map_err(|error| failed(&partial)(error.into_error()))?.file;
        file.write_all_at(&sealed(checkpoint, calibration, hashes, data_bytes)?, 0).map_err(failed(&partial))?;
        file.sync_all().map_err(failed(&partial))?;
        partial.persist_noclobber(path).map_err(|taken| failed(path)(taken.error))
    })();
    let there = |error: &Error| matches!(error, Error::Io { source, .. } if source.kind() == ErrorKind::AlreadyExists);
    match written {
        // another process was faster
        Err(error) if there(&error) => match StatisticsFile::open(path) {
            Ok(saved) if saved.text() == calibration.fingerprint() => Ok(saved),
            _ => Err(error),
        },
        written => written.and_then(|()| StatisticsFile::open(path)),
    }
}

/// A file of a random name beside `path`: nothing that lies there is followed or emptied. It is removed after an error.
fn unfinished(path: &Path) -> Result<NamedTempFile> {
    let mut prefix = std::ffi::OsString::from(".");
    prefix.push(path.file_name().unwrap_or_default());
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut refused = None; // the system's own error, which the builder wraps
    let made = tempfile::Builder::new().prefix(&prefix).suffix(".mqadapt-partial").make_in(folder, |path| {
        let file = File::create_new(path);
        refused = file.as_ref().err().and_then(std::io::Error::raw_os_error);
        file
    });
    made.map_err(|error| failed(path)(refused.map_or(error, std::io::Error::from_raw_os_error)))
}

/// A file, and a hash of what was written to it since the last one was taken.
struct Hashing {
    file: File,
    hash: Xxh3,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(bytes.get(..written).unwrap_or_default());
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// The hash of what was written since the last call.
fn next_hash(out: &mut BufWriter<Hashing>) -> std::io::Result<String> {
    out.flush()?;
    let hash = &mut out.get_mut().hash;
    let digest = format!("{:032x}", hash.digest128());
    hash.reset();
    Ok(digest)
}

/// The weights of a layer, in the model's order.
fn names_of(checkpoint: &Checkpoint, layer_idx: usize) -> Vec<String> {
    let of_layer = |name: &String| LayerTensor::parse(name).is_some_and(|tensor| tensor.layer_idx == layer_idx);
    checkpoint.config().tensors().into_iter().map(|tensor| tensor.name).filter(of_layer).collect()
}

/// The header with all hashes, that of itself last; as long as the one without.
fn sealed(checkpoint: &Checkpoint, calibration: &Calibration, mut hashes: Hashes, data_bytes: u64) -> Result<Vec<u8>> {
    let (header, _) = layout(checkpoint, calibration, &hashes)?;
    let json = header.get(8..).unwrap_or_default();
    if let Ok(parsed) = Header::parse(json, header.len() as u64 + data_bytes) {
        let metadata = parsed.metadata.unwrap_or_default().into_iter().collect();
        hashes.insert(HEADER_HASH.to_owned(), header_hash(&metadata, &parsed.entries));
    }
    Ok(layout(checkpoint, calibration, &hashes)?.0)
}

/// XXH3 (128 bits) of all that a header says beside this hash.
fn header_hash(metadata: &BTreeMap<String, String>, entries: &[HeaderEntry]) -> String {
    let mut hash = Xxh3::new();
    for (key, value) in metadata.iter().filter(|(key, _)| *key != HEADER_HASH) {
        hash.update(format!("{}:{key}={}:{value}\n", key.len(), value.len()).as_bytes());
    }
    for HeaderEntry { name, dtype, shape, start, bytes } in entries {
        hash.update(format!("{}:{name} {dtype:?} {shape:?} {start} {bytes}\n", name.len()).as_bytes());
    }
    format!("{:032x}", hash.digest128())
}

/// The header of the file for this pass, with its 8 bytes of length, and the bytes of data. Hashes that are not known yet are
/// zeros.
fn layout(checkpoint: &Checkpoint, calibration: &Calibration, hashes: &Hashes) -> Result<(Vec<u8>, u64)> {
    let config = checkpoint.config();
    let measured = calibration.measured();
    let tokens: usize = calibration.sequences.iter().map(Vec::len).sum();
    let mut header = Map::new();
    let mut metadata = json!({
        "format": FORMAT,
        "model": checkpoint.fingerprint()?,
        "text": calibration.fingerprint(),
        "tokens": tokens.to_string(),
        "context": calibration.lengths().iter().map(usize::to_string).collect::<Vec<_>>().join(","),
    });
    let mut hashed = |key: String| {
        let value = hashes.get(&key).map_or(UNKNOWN, String::as_str);
        metadata[key] = json!(value);
    };
    hashed(HEADER_HASH.to_owned());
    hashed(EMBEDDING_WEIGHTS.to_owned());
    (0..config.num_hidden_layers).for_each(|layer_idx| hashed(layer_weights(layer_idx)));
    let mut at = 0u64;
    let mut add = |name: String, dtype: &str, shape: &[usize], bytes: usize| {
        let end = at + (shape.iter().product::<usize>() * bytes) as u64;
        hashed(values(&name));
        header.insert(name, json!({"dtype": dtype, "shape": shape, "data_offsets": [at, end]}));
        at = end;
    };
    for layer_idx in 0..config.num_hidden_layers {
        let geometry = attention(config, layer_idx)?;
        let block = block_heads(&geometry, 1, &Moment::ALL);
        let shape = StatisticsShape::new(&geometry, Some(block)).map_err(Error::merge(layer_idx))?;
        for (name, shape) in shape.tensors() {
            add(format!("layers.{layer_idx}.{name}"), "F64", &shape, 8);
        }
        for (n, (_, tokens)) in measured.iter().enumerate() {
            add(format!("layers.{layer_idx}.inputs.{n}"), "F32", &[*tokens, config.hidden_size], 4);
        }
    }
    header.insert("__metadata__".to_owned(), metadata);
    let mut json = serde_json::to_vec(&Value::Object(header)).unwrap_or_default();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut out = (json.len() as u64).to_le_bytes().to_vec();
    out.extend(json);
    Ok((out, at))
}

impl StatisticsFile {
    /// Opens and checks a file.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Statistics`] where it is not such a file.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, len) = open_regular(path)?;
        let wrong = |detail: String| Error::Statistics { path: path.to_owned(), detail };
        let mut prefix = [0; 8];
        file.read_exact_at(&mut prefix, 0).map_err(|_| wrong(format!("it has {len} bytes, less than a header")))?;
        let claimed = u64::from_le_bytes(prefix);
        if claimed > MAX_HEADER_BYTES || claimed > len - 8 {
            return Err(wrong(format!(
                "its header claims {claimed} bytes of {len}; it is truncated, or another kind of file"
            )));
        }
        let mut json = vec![0; usize::try_from(claimed).unwrap_or(0)];
        file.read_exact_at(&mut json, 8).map_err(failed(path))?;
        let header = Header::parse(&json, len).map_err(|problem| wrong(problem.to_string()))?;
        let metadata: BTreeMap<String, String> = header.metadata.unwrap_or_default().into_iter().collect();
        let format = metadata.get("format").map_or("nothing", String::as_str);
        if format != FORMAT {
            return Err(wrong(format!("its metadata says format {format}, expected {FORMAT}; collect them again")));
        }
        let (said, found) = (metadata.get(HEADER_HASH), header_hash(&metadata, &header.entries));
        if said != Some(&found) {
            return Err(wrong(damaged("its header", &found, said)));
        }
        let entries = header.entries.into_iter().map(|entry| (entry.name.clone(), entry)).collect();
        let (data_start, checked) = (header.data_start, AtomicUsize::new(0));
        Ok(Self { path: path.to_owned(), file, data_start, entries, metadata, checked })
    }

    /// Tokens of the text.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.metadata.get("tokens").and_then(|tokens| tokens.parse().ok()).unwrap_or(0)
    }

    /// [`Calibration::lengths`] of the text.
    #[must_use]
    pub fn lengths(&self) -> Vec<usize> {
        let lengths = self.metadata.get("context").map_or("", String::as_str);
        lengths.split(',').filter_map(|length| length.parse().ok()).filter(|length| *length > 0).collect()
    }

    /// [`Calibration::fingerprint`] of the text.
    #[must_use]
    pub fn text(&self) -> &str {
        self.metadata.get("text").map_or("", String::as_str)
    }

    /// Checks that the statistics are of a model, as far as samples of its weights tell; [`Self::check_weights`] reads all.
    ///
    /// # Errors
    /// [`Error::Statistics`] with both fingerprints.
    pub fn check_model(&self, fingerprint: &str) -> Result<()> {
        let model = self.metadata.get("model").map_or("nothing", String::as_str);
        if model == fingerprint {
            return Ok(());
        }
        let detail = format!("they are of the model {model}, this one is {fingerprint}; collect them again");
        Err(self.wrong(detail))
    }

    /// Checks that every weight that a layer's statistics come from is that of this model: the embedding, the layers before,
    /// and its own. Reads those that this process has not read for a check before. Progress: layers, phase `calibrate`.
    ///
    /// # Errors
    /// [`Error::Statistics`] names the first layer that differs; [`Error::Checkpoint`].
    pub fn check_weights(&self, checkpoint: &Checkpoint, layer_idx: usize, progress: &dyn Progress) -> Result<()> {
        let total = checkpoint.config().num_hidden_layers as u64;
        let check = |key: &str, what: &str, found: &str| {
            let said = self.metadata.get(key).map(String::as_str);
            if said == Some(found) {
                return Ok(());
            }
            let (model, said) = (checkpoint.path().display(), said.unwrap_or("nothing"));
            let detail = format!(
                "they are of a model whose {what} has other weights (XXH3 {said}) than that of {model} ({found}); collect \
                 them again, or give the model that they are of"
            );
            Err(self.wrong(detail))
        };
        for step in self.checked.load(Ordering::Relaxed)..layer_idx + 2 {
            match step.checked_sub(1) {
                None => check(EMBEDDING_WEIGHTS, "embedding", &checkpoint.weights_digest([EMBED_TOKENS])?)?,
                Some(layer) => {
                    Progressing { progress, phase: CALIBRATE, done: layer as u64, total }.tell()?;
                    let found = checkpoint.weights_digest(names_of(checkpoint, layer))?;
                    check(&layer_weights(layer), &format!("layer {layer}"), &found)?;
                }
            }
            checkpoint.shards().iter().for_each(Shard::release);
            self.checked.store(step + 1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn wrong(&self, detail: String) -> Error {
        Error::Statistics { path: self.path.clone(), detail }
    }

    /// What is known of one layer.
    ///
    /// # Errors
    /// [`Error::Statistics`] where a tensor is missing or does not fit the layer; [`Error::Io`].
    pub fn layer(&self, layer_idx: usize, geometry: &AttentionShape) -> Result<LayerSample> {
        let block = block_heads(geometry, 1, &Moment::ALL);
        let shape = StatisticsShape::new(geometry, Some(block)).map_err(Error::merge(layer_idx))?;
        let mut tensors = NamedTensors::new();
        for (name, expected) in shape.tensors() {
            let entry = self.entry(&format!("layers.{layer_idx}.{name}"), safetensors::Dtype::F64, &expected)?;
            let bytes = self.read(entry)?;
            let values = bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
            tensors.insert(name.to_owned(), (entry.shape.clone(), values));
        }
        let statistics = LayerStatistics::from_tensors(shape, &tensors).map_err(Error::merge(layer_idx))?;
        let mut inputs = Vec::new();
        while let Some(entry) = self.entries.get(&format!("layers.{layer_idx}.inputs.{}", inputs.len())) {
            let expected = [entry.shape.first().copied().unwrap_or(0), geometry.hidden_size];
            let entry = self.entry(&entry.name, safetensors::Dtype::F32, &expected)?;
            let bytes = self.read(entry)?;
            inputs.push(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect());
        }
        Ok(LayerSample { statistics, inputs })
    }

    fn entry(&self, name: &str, dtype: safetensors::Dtype, shape: &[usize]) -> Result<&HeaderEntry> {
        let entry = self.entries.get(name).ok_or_else(|| self.wrong(format!("tensor '{name}' is missing")))?;
        if entry.dtype == dtype && entry.shape == shape {
            return Ok(entry);
        }
        let found = (&entry.dtype, &entry.shape);
        Err(self.wrong(format!("tensor '{name}' is {found:?}, expected {:?}", (dtype, shape))))
    }

    fn read(&self, entry: &HeaderEntry) -> Result<Vec<u8>> {
        let len =
            usize::try_from(entry.bytes).map_err(|_| self.wrong(format!("tensor '{}' is too large", entry.name)))?;
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, self.data_start + entry.start).map_err(failed(&self.path))?;
        let (said, found) = (self.metadata.get(&values(&entry.name)), format!("{:032x}", xxh3_128(&bytes)));
        if said == Some(&found) {
            return Ok(bytes);
        }
        Err(self.wrong(damaged(&format!("tensor '{}'", entry.name), &found, said)))
    }
}

/// In words, that something is not what was written.
fn damaged(what: &str, found: &str, said: Option<&String>) -> String {
    let said = said.map_or("nothing", String::as_str);
    format!(
        "{what} is not what was written: its XXH3 is {found}, expected {said}; the file is damaged: collect them again"
    )
}
