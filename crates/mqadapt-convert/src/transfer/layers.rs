//! Methods that need whole layers: each is read, merged and put into its place before the rest is streamed around it.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use mqadapt_checkpoint::{Shard, convert_stored, store};
use mqadapt_compress::{LayerError, LayerMethod, LayerWeights, MergedLayer};
use mqadapt_core::family::LayerTensor;
use mqadapt_core::{DType, LayerCache};
use serde_json::{Map, Value};
use xxhash_rust::xxh3::Xxh3;

use super::tensors::{Transfer, refuse_overflow};
use crate::folder::directory::partial;
use crate::layout::{Layout, Operation, OutputShard, OutputTensor};
use crate::resume::journal::{Journal, LayerLine, Past};
use crate::resume::unfinished::digest;
use crate::{Error, Result};

/// What a method that needs whole layers said of them.
#[derive(Debug, Default)]
pub(crate) struct LayerNotes {
    pub relative_error: BTreeMap<usize, f64>,
    pub notes: Map<String, Value>,
    /// XXH3 (128 bits) of those of the merged layers as they are stored: a resumed conversion must get the same again.
    pub xxh3_128: String,
}

impl Transfer<'_> {
    /// Puts the layers into their places.
    pub fn layers(
        &mut self,
        layout: &Layout,
        past: &Past,
        journal: &mut Journal,
        method: &mut dyn LayerMethod,
    ) -> Result<LayerNotes> {
        let mut out = LayerNotes::default();
        let mut hash = Xxh3::new();
        for layer_idx in 0..self.reader.checkpoint.config().num_hidden_layers {
            let places: Vec<_> =
                layout.shards.iter().flat_map(|shard| shard.of_layer(layer_idx).map(move |t| (shard, t))).collect();
            if places.is_empty() {
                continue;
            }
            self.report.report(0)?;
            let line = match past.layer(layer_idx) {
                Some(line) if self.resumed_layer(line, &places, method)? => line.clone(),
                before => {
                    if before.is_some() {
                        let path = self.work.path().display();
                        let what = "is damaged or lost (its checksum is wrong) and is merged again";
                        self.resumed.notes.push(format!("{path}: what is stored of layer {layer_idx} {what}"));
                    }
                    let mut merged = self.merged_layer(layer_idx, &places, method)?;
                    let mut of_layer = Xxh3::new();
                    for (shard, tensor) in places {
                        let write = self.resumed.complete(shard).is_none();
                        self.put(shard, tensor, &mut merged.weights, write, &mut of_layer)?;
                    }
                    self.reader.checkpoint.shards().iter().for_each(Shard::release);
                    let line = LayerLine {
                        layer_idx,
                        layer_xxh3_128: digest(&of_layer),
                        relative_error_bits: merged.relative_error.to_bits(),
                        notes: merged.notes,
                    };
                    journal.layer(&line)?;
                    line
                }
            };
            hash.update(line.layer_xxh3_128.as_bytes());
            out.relative_error.insert(layer_idx, f64::from_bits(line.relative_error_bits));
            out.notes.insert(layer_idx.to_string(), line.notes);
        }
        out.xxh3_128 = digest(&hash);
        Ok(out)
    }

    /// Whether a layer of an earlier run is still in its place (after a power failure it may not be); shows it to the method.
    fn resumed_layer(
        &mut self,
        line: &LayerLine,
        places: &[(&OutputShard, &OutputTensor)],
        method: &mut dyn LayerMethod,
    ) -> Result<bool> {
        let (mut hash, mut weights) = (Xxh3::new(), LayerWeights::default());
        for (shard, tensor) in places {
            let complete = self.resumed.complete(shard).is_some();
            let file = self.work.open_file(&if complete { shard.name.clone() } else { partial(&shard.name) })?;
            let (Some(file), Some(width)) = (file, tensor.dtype.value_bytes()) else { return Ok(false) };
            let count = tensor.shape.iter().product::<usize>();
            let (mut stored, mut wide) = (vec![0; count * width], vec![0; count * DType::F32.bytes()]);
            if file.read_exact_at(&mut stored, tensor.offset).is_err() {
                return Ok(false);
            }
            hash.update(&stored);
            convert_stored(tensor.dtype, &stored, DType::F32, &mut wide);
            let values = wide.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            if let Operation::Layer(LayerTensor { module, bias, .. }) = tensor.operation {
                weights.insert(module, bias, values);
            }
        }
        if digest(&hash) != line.layer_xxh3_128 {
            return Ok(false);
        }
        method
            .resume_layer(line.layer_idx, self.cache(line.layer_idx)?, &weights)
            .map_err(|error| self.refused(error))?;
        Ok(true)
    }

    /// What the plan asks a layer to cache.
    fn cache(&self, layer_idx: usize) -> Result<LayerCache> {
        let none = || self.refused(LayerError::Refused(format!("has no plan for layer {layer_idx}")));
        self.plan.layers().get(layer_idx).copied().ok_or_else(none)
    }

    /// What a method says, as an error of the conversion.
    fn refused(&self, error: LayerError) -> Error {
        match error {
            LayerError::Interrupted(interrupted) => Error::Interrupted(interrupted),
            LayerError::Refused(detail) => Error::Method { method: self.options.method.name.to_owned(), detail },
        }
    }

    /// Reads a layer and has it merged.
    fn merged_layer(
        &mut self,
        layer_idx: usize,
        places: &[(&OutputShard, &OutputTensor)],
        method: &mut dyn LayerMethod,
    ) -> Result<MergedLayer> {
        let mut weights = LayerWeights::default();
        for (_, place) in places {
            let Operation::Layer(LayerTensor { module, bias, .. }) = place.operation else { continue };
            let source = self.reader.source(place.source)?;
            let mut values = vec![0.0; source.len()];
            self.reader.checkpoint.read_finite(source, 0, &mut values)?;
            self.reader.bytes_read += source.bytes;
            weights.insert(module, bias, values);
        }
        let mut merged =
            method.merge_layer(layer_idx, self.cache(layer_idx)?, &weights).map_err(|error| self.refused(error))?;
        for (_, place) in places {
            let Operation::Layer(LayerTensor { module, bias, .. }) = place.operation else { continue };
            let name = &self.reader.source(place.source)?.name;
            let expected = place.shape.iter().product::<usize>();
            match merged.weights.tensor_mut(module, bias) {
                Some(values) if values.len() == expected => {}
                found => {
                    let found = found.map_or_else(|| "nothing".to_owned(), |values| format!("{} values", values.len()));
                    let detail = format!("gave {found} for '{name}', which takes {expected}");
                    return Err(self.refused(LayerError::Refused(detail)));
                }
            }
        }
        Ok(merged)
    }

    /// Rounds and hashes one merged tensor of a layer, and writes it into the unfinished file of its shard.
    fn put(
        &mut self,
        shard: &OutputShard,
        tensor: &OutputTensor,
        weights: &mut LayerWeights,
        write: bool,
        hash: &mut Xxh3,
    ) -> Result<()> {
        let name = &self.reader.source(tensor.source)?.name;
        let Operation::Layer(LayerTensor { module, bias, .. }) = tensor.operation else { return Ok(()) };
        let values = weights.tensor_mut(module, bias);
        let (Some(values), Some(width)) = (values, tensor.dtype.value_bytes()) else { return Ok(()) };
        let unfinished = partial(&shard.name);
        let path = self.work.path().join(&unfinished);
        let file = if write { Some(self.work.open_or_create(&unfinished)?) } else { None };
        let mut at = tensor.offset;
        for values in values.chunks_mut(self.piece / width.max(4)) {
            let mut out = vec![0; values.len() * width];
            refuse_overflow(name, tensor.dtype, store(values, tensor.dtype, &mut out))?;
            hash.update(&out);
            if let Some(file) = &file {
                file.write_all_at(&out, at).map_err(Error::io("write", &path))?;
            }
            at += out.len() as u64;
        }
        Ok(())
    }
}

impl OutputShard {
    /// The tensors that a layer method gives for this layer.
    fn of_layer(&self, layer_idx: usize) -> impl Iterator<Item = &OutputTensor> {
        self.tensors
            .iter()
            .filter(move |tensor| matches!(tensor.operation, Operation::Layer(layer) if layer.layer_idx == layer_idx))
    }
}
