//! The names of files in a converted checkpoint.

/// The manifest.
pub const MANIFEST_FILE: &str = "mqadapt.json";
/// The modelling file of checkpoints whose layers differ.
pub(crate) const MODELING_FILE: &str = "modeling_mqadapt.py";
/// The only weights file of a checkpoint without an index.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";
/// The index.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";
