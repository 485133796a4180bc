//! What a conversion can be told, and what it reports.

use std::collections::BTreeMap;

use mqadapt_compress::{MergeOptions, Method};
use mqadapt_core::DType;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::{Manifest, TARGETS, Target};

/// What a conversion can be told.
#[derive(Clone)]
#[allow(clippy::struct_excessive_bools)] // independent switches of the command line
pub struct ConvertOptions {
    /// How heads are merged.
    pub method: &'static Method,
    /// What the method is told.
    pub merge: MergeOptions,
    /// How the result is written.
    pub target: &'static dyn Target,
    /// Type of the written weights; `None`: as stored (quantised ones: [`mqadapt_checkpoint::Checkpoint::dtype`]).
    pub dtype: Option<DType>,
    /// Replace an existing checkpoint (only once the new one is complete), or start again instead of resuming.
    pub overwrite: bool,
    /// Continue an unfinished conversion, and leave one that fails for the next attempt.
    pub resume: bool,
    /// Cut the output into files of at most this many bytes of tensors; `None`: as the source.
    pub max_shard_size: Option<u64>,
    /// Bytes of buffers.
    pub max_memory: u64,
    /// Wait until the disk has everything; without, a power failure right after the conversion can lose it (a kill cannot).
    pub sync: bool,
    /// What else the method was told, for the manifest; a conversion is continued only with the same.
    pub method_options: Map<String, Value>,
    /// What the manifest calls the source (`org/name@revision`); `None`: its path.
    pub source_name: Option<String>,
}

impl ConvertOptions {
    /// The default: this method, a checkpoint for transformers, everything else as stored, durable, 64 MiB of buffers.
    #[must_use]
    pub fn new(method: &'static Method, merge: MergeOptions) -> Self {
        Self {
            method,
            merge,
            target: TARGETS[0],
            dtype: None,
            overwrite: false,
            resume: false,
            max_shard_size: None,
            max_memory: 64 << 20,
            sync: true,
            method_options: Map::new(),
            source_name: None,
        }
    }
}

/// What a conversion did.
#[derive(Debug, Clone, Serialize)]
pub struct ConversionReport {
    /// The manifest that was written.
    #[serde(flatten)]
    pub manifest: Manifest,
    /// Bytes read from the source's tensors.
    pub bytes_read: u64,
    /// Bytes of the files written.
    pub bytes_written: u64,
    /// Wall time.
    pub seconds: f64,
    /// Values that are infinite or not a number, of each tensor that this run copied: they stay as they are.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub not_finite: BTreeMap<String, u64>,
    /// Most memory that this process ever held, where the system tells.
    pub peak_rss_bytes: Option<u64>,
    /// What of the resumed conversion was damaged and was done again, a sentence each.
    pub redone: Vec<String>,
}

/// Most memory that this process ever held.
pub(crate) fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}
