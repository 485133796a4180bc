//! Reading a statistics file, one layer at a time, and checking it against the model.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use mqadapt_checkpoint::{Checkpoint, Header, HeaderEntry, MAX_HEADER_BYTES, Shard, open_regular};
use mqadapt_compress::{LayerStatistics, Moment, NamedTensors, StatisticsShape};
use mqadapt_core::family::EMBED_TOKENS;
use mqadapt_core::{AttentionShape, Progress, Progressing};
use mqadapt_model::CALIBRATE;
use xxhash_rust::xxh3::xxh3_128;

use super::header::{EMBEDDING_WEIGHTS, FORMAT, HEADER_HASH, failed, header_hash, layer_weights, names_of, values};
use crate::calibration::LayerSample;
use crate::collector::block_heads;
use crate::{Error, Result};

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

    /// [`Calibration::lengths`](crate::Calibration::lengths) of the text.
    #[must_use]
    pub fn lengths(&self) -> Vec<usize> {
        let lengths = self.metadata.get("context").map_or("", String::as_str);
        lengths.split(',').filter_map(|length| length.parse().ok()).filter(|length| *length > 0).collect()
    }

    /// [`Calibration::fingerprint`](crate::Calibration::fingerprint) of the text.
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
