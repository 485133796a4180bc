//! The header of a statistics file: names, shapes and hashes. In: checkpoint and text; out: bytes, and what they are checked by.

use std::collections::BTreeMap;
use std::path::Path;

use mqadapt_checkpoint::{Checkpoint, Header, HeaderEntry};
use mqadapt_compress::{Moment, StatisticsShape};
use mqadapt_core::family::LayerTensor;
use serde_json::{Map, Value, json};
use xxhash_rust::xxh3::Xxh3;

use crate::calibration::Calibration;
use crate::collector::block_heads;
use crate::weights::attention;
use crate::{Error, Result};

/// `format` of the metadata; the number changes when the meaning of a tensor does, or how it is computed.
pub(super) const FORMAT: &str = "mqadapt-statistics-4";
/// Metadata: XXH3 (128 bits) of the rest of the header.
pub(super) const HEADER_HASH: &str = "xxh3_128";
/// Metadata: [`Checkpoint::weights_digest`] of the embedding.
pub(super) const EMBEDDING_WEIGHTS: &str = "weights.embed_tokens";
/// As long as every hash; in the header until the hashes are known.
pub(super) const UNKNOWN: &str = "00000000000000000000000000000000";

/// Metadata: [`Checkpoint::weights_digest`] of a layer.
pub(super) fn layer_weights(layer_idx: usize) -> String {
    format!("weights.layers.{layer_idx}")
}

/// Metadata: XXH3 (128 bits) of a tensor of the file.
pub(super) fn values(tensor: &str) -> String {
    format!("xxh3_128.{tensor}")
}

/// The hashes that a header has once they are known.
pub(super) type Hashes = BTreeMap<String, String>;

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

pub(super) fn failed(path: &Path) -> impl Fn(std::io::Error) -> Error + '_ {
    move |source| Error::Io { path: path.to_owned(), source }
}

/// The weights of a layer, in the model's order.
pub(super) fn names_of(checkpoint: &Checkpoint, layer_idx: usize) -> Vec<String> {
    let of_layer = |name: &String| LayerTensor::parse(name).is_some_and(|tensor| tensor.layer_idx == layer_idx);
    checkpoint.config().tensors().into_iter().map(|tensor| tensor.name).filter(of_layer).collect()
}

/// The header with all hashes, that of itself last; as long as the one without.
pub(super) fn sealed(
    checkpoint: &Checkpoint,
    calibration: &Calibration,
    mut hashes: Hashes,
    data_bytes: u64,
) -> Result<Vec<u8>> {
    let (header, _) = layout(checkpoint, calibration, &hashes)?;
    let json = header.get(8..).unwrap_or_default();
    if let Ok(parsed) = Header::parse(json, header.len() as u64 + data_bytes) {
        let metadata = parsed.metadata.unwrap_or_default().into_iter().collect();
        hashes.insert(HEADER_HASH.to_owned(), header_hash(&metadata, &parsed.entries));
    }
    Ok(layout(checkpoint, calibration, &hashes)?.0)
}

/// XXH3 (128 bits) of all that a header says beside this hash.
pub(super) fn header_hash(metadata: &BTreeMap<String, String>, entries: &[HeaderEntry]) -> String {
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
pub(super) fn layout(checkpoint: &Checkpoint, calibration: &Calibration, hashes: &Hashes) -> Result<(Vec<u8>, u64)> {
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
