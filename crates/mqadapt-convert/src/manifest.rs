//! `mqadapt.json`: what a converted checkpoint was made from, how, and what its files contain.

use std::collections::HashSet;
use std::io::ErrorKind;
use std::path::Path;

use mqadapt_checkpoint::read_small;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::file_names::{INDEX_FILE, MANIFEST_FILE, MODELING_FILE};
use crate::{Error, Result};

/// Longest manifest that is read.
pub(crate) const MAX_MANIFEST_BYTES: u64 = 64 << 20;

/// The content of `mqadapt.json`. Equal conversions write equal manifests: nothing here depends on time or machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this format, 1.
    pub format_version: u32,
    /// Version of the package that wrote it.
    pub mqadapt_version: String,
    /// What was converted.
    pub source: SourceRecord,
    /// The plan, in the form of a plan file.
    pub plan: PlanRecord,
    /// The merge method.
    pub method: String,
    /// What the method was told.
    pub options: Map<String, Value>,
    /// Type of the matrices written: `float32`, `float16`, `bfloat16`.
    pub dtype: String,
    /// K/V heads of each layer of the source.
    pub num_key_value_heads_before: Vec<usize>,
    /// K/V heads of each layer now.
    pub num_key_value_heads_after: Vec<usize>,
    /// For each layer, `|source - merged repeated back| / |source|` over its K and V weights and biases as written
    /// (Frobenius norm); 0 for layers that did not change.
    pub relative_error: Vec<f64>,
    /// What a calibrated method says of each layer it changed; empty for the others.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub layers: Map<String, Value>,
    /// Bytes that a token adds to the K/V cache in the source's and in this dtype.
    pub kv_bytes_per_token_before: u64,
    /// The same, now.
    pub kv_bytes_per_token_after: u64,
    /// Parameters of the source, tied embeddings counted once.
    pub parameters_before: u64,
    /// Parameters now.
    pub parameters_after: u64,
    /// The files that hold tensors.
    pub shards: Vec<ShardRecord>,
    /// The names of all files that were written, in order, with `/` after a folder: what `--overwrite` may remove. Empty in
    /// manifests of earlier builds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub files: Vec<String>,
}

/// What was converted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceRecord {
    /// Hub id or path, as given.
    pub name: String,
    /// [`mqadapt_checkpoint::Checkpoint::fingerprint`].
    pub fingerprint: String,
}

/// A plan in the form of a plan file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanRecord {
    /// K/V heads of each layer.
    pub num_key_value_heads: Vec<usize>,
}

/// A file that holds tensors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShardRecord {
    /// Its name in the folder.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// XXH3 (128 bits) of its bytes, in hexadecimal.
    pub xxh3_128: String,
}

/// Whether a name is that of a file in the folder or in a folder of it, not hidden.
fn is_below(name: &str) -> bool {
    let parts = || name.split('/');
    parts().count() <= 2 && parts().all(|part| !part.is_empty() && !part.starts_with('.') && !part.contains('\0'))
}

impl Manifest {
    /// Parses a manifest.
    ///
    /// # Errors
    /// What is wrong, in words.
    pub fn parse(json: &[u8]) -> std::result::Result<Self, String> {
        let manifest: Self = serde_json::from_slice(json).map_err(|e| format!("cannot be read: {e}"))?;
        if manifest.format_version != 1 {
            return Err(format!("has format_version {}; this version reads 1", manifest.format_version));
        }
        let layers = manifest.num_key_value_heads_after.len();
        let lengths = [
            manifest.num_key_value_heads_before.len(),
            manifest.plan.num_key_value_heads.len(),
            manifest.relative_error.len(),
        ];
        if lengths.iter().any(|&len| len != layers) {
            return Err(format!("names {layers} layers in num_key_value_heads_after, but {lengths:?} elsewhere"));
        }
        let outside = |shard: &&ShardRecord| shard.name.contains(['/', '\\']) || shard.name.starts_with('.');
        if let Some(shard) = manifest.shards.iter().find(outside) {
            return Err(format!("the shard {:?} is not a plain file name", shard.name));
        }
        if let Some(name) = manifest.files.iter().find(|name| !is_below(name)) {
            return Err(format!("the file {name:?} is not in this folder or in a folder of it"));
        }
        Ok(manifest)
    }

    /// The files that were certainly written by the conversion: those that it lists; without a list, those that only a
    /// conversion makes.
    pub(crate) fn written(&self) -> HashSet<String> {
        let made = ["config.json", MANIFEST_FILE, INDEX_FILE, MODELING_FILE].map(str::to_owned).into_iter();
        let shards = self.shards.iter().map(|shard| shard.name.clone());
        if self.files.is_empty() { made.chain(shards).collect() } else { self.files.iter().cloned().collect() }
    }

    /// Reads the manifest of a converted checkpoint; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Checkpoint`] where it cannot be read, [`Error::Manifest`].
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(MANIFEST_FILE);
        let wrong = |detail| Error::Manifest { path: path.clone(), detail };
        match read_small(&path, MAX_MANIFEST_BYTES) {
            Ok(json) => Self::parse(&json).map(Some).map_err(wrong),
            Err(mqadapt_checkpoint::Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The text of `mqadapt.json`.
    #[must_use]
    pub fn to_json(&self) -> String {
        // every field is a number, a string or a list of them, so this cannot fail
        serde_json::to_string_pretty(self).unwrap_or_default() + "\n"
    }
}
