//! Methods that need whole layers: each is read, merged and put into its place before the rest is streamed around it.

use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::FileExt;

use mqadapt_checkpoint::{Shard, round};
use serde_json::{Map, Value};
use xxhash_rust::xxh3::Xxh3;

use crate::engine::{Engine, refuse_overflow};
use crate::journal::Past;
use crate::layers::{LayerError, LayerMerge, LayerWeights, MergedLayer};
use crate::layout::{How, Layout, OutputShard, OutputTensor};
use crate::unfinished::{completed_before, open, partial};
use crate::{Error, Result};

/// What a method that needs whole layers said of them.
#[derive(Debug, Default)]
pub(crate) struct LayerNotes {
    pub relative_error: BTreeMap<usize, f64>,
    pub notes: Map<String, Value>,
    /// XXH3 (128 bits) of the merged weights as they are stored: a resumed conversion must get the same again.
    pub xxh3_128: String,
}

impl Engine<'_> {
    /// Puts the layers into their places.
    pub fn layers(&mut self, layout: &Layout, past: &Past, method: &mut dyn LayerMerge) -> Result<LayerNotes> {
        let mut out = LayerNotes::default();
        let mut hash = Xxh3::new();
        let complete: HashSet<&str> = layout
            .shards
            .iter()
            .filter(|s| completed_before(self.work, s, past.marks(&s.name)).is_some())
            .map(|s| s.name.as_str())
            .collect();
        for layer_idx in 0..self.checkpoint.config().num_hidden_layers {
            let places: Vec<_> =
                layout.shards.iter().flat_map(|shard| shard.of_layer(layer_idx).map(move |t| (shard, t))).collect();
            if places.is_empty() {
                continue;
            }
            self.report(0)?;
            let mut merged = self.merged_layer(layer_idx, &places, method)?;
            for (shard, tensor) in places {
                let write = !complete.contains(shard.name.as_str());
                self.put(shard, tensor, &mut merged.weights, write, &mut hash)?;
            }
            self.checkpoint.shards().iter().for_each(Shard::release);
            out.relative_error.insert(layer_idx, merged.relative_error);
            out.notes.insert(layer_idx.to_string(), merged.notes);
        }
        out.xxh3_128 = format!("{:032x}", hash.digest128());
        Ok(out)
    }

    /// Reads a layer and has it merged.
    fn merged_layer(
        &mut self,
        layer_idx: usize,
        places: &[(&OutputShard, &OutputTensor)],
        method: &mut dyn LayerMerge,
    ) -> Result<MergedLayer> {
        let mut weights = LayerWeights::new();
        for (_, place) in places {
            let source = self.source(place.source)?;
            let mut values = vec![0.0; source.len()];
            self.checkpoint.read_f32(source, 0, &mut values)?;
            self.bytes_read += source.bytes;
            weights.insert(source.name.clone(), values);
        }
        let heads = self.plan.layers().get(layer_idx).map_or(0, |choice| choice.num_key_value_heads());
        let failed = |detail| Error::Method { method: self.options.method.name.to_owned(), detail };
        let merged = method.merge_layer(layer_idx, heads, weights).map_err(|error| match error {
            LayerError::Interrupted(interrupted) => Error::Interrupted(interrupted),
            LayerError::Refused(detail) => failed(detail),
        })?;
        for (_, place) in places {
            let name = &self.source(place.source)?.name;
            let expected = place.shape.iter().product::<usize>();
            match merged.weights.get(name) {
                Some(values) if values.len() == expected => {}
                found => {
                    let found = found.map_or_else(|| "nothing".to_owned(), |values| format!("{} values", values.len()));
                    return Err(failed(format!("gave {found} for '{name}', which takes {expected}")));
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
        let name = &self.source(tensor.source)?.name;
        let (Some(values), Some(dtype)) = (weights.get_mut(name), tensor.dtype.float()) else { return Ok(()) };
        let path = partial(&self.work.join(&shard.name));
        let file = if write { Some(open(&path)?) } else { None };
        let mut at = tensor.offset;
        for values in values.chunks_mut(self.piece / 4) {
            let mut out = vec![0; values.len() * dtype.bytes()];
            refuse_overflow(name, dtype, round(values, dtype, &mut out))?;
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
            .filter(move |tensor| matches!(tensor.how, How::Layer(layer) if layer.layer_idx == layer_idx))
    }
}
