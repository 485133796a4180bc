//! The file of a plan, JSON or YAML. In: its content and the model's configuration; out: a plan.

use std::fmt;

use serde_json::Value;

use super::Plan;
use crate::{CacheStorage, Error, LayerCache, ModelConfig, Result};

impl Plan {
    /// Reads the content of a plan file, JSON or YAML: `{"num_key_value_heads": [3, 3, 1, ...]}`, and
    /// `"storage": ["int4", "computed", ...]` where caches are not stored as computed.
    ///
    /// # Errors
    /// [`Error::Syntax`], and those of [`Self::from_heads`].
    pub fn from_document(text: &str, config: &ModelConfig) -> Result<Self> {
        let wrong = |detail: String| Error::Syntax { what: "plan", detail };
        // JSON is tried first: its messages are better, and only a subset of YAML would be left to check
        let document: Value = if text.trim_start().starts_with('{') {
            serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?
        } else {
            serde_yaml_ng::from_str(text).map_err(|e| wrong(e.to_string()))?
        };
        let expected = "expected {\"num_key_value_heads\": [one whole number per layer]}, and where caches are not stored as computed \"storage\": [one of \"computed\", \"int8\" and \"int4\" per layer]";
        let fields = document.as_object().ok_or_else(|| wrong(expected.to_owned()))?;
        if let Some(unknown) = fields.keys().find(|key| !matches!(key.as_str(), "num_key_value_heads" | "storage")) {
            return Err(wrong(format!("unknown field '{unknown}'; {expected}")));
        }
        let entries =
            fields.get("num_key_value_heads").and_then(Value::as_array).ok_or_else(|| wrong(expected.to_owned()))?;
        let heads: Option<Vec<_>> = entries.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok())).collect();
        let plan = Self::from_heads(&heads.ok_or_else(|| wrong(expected.to_owned()))?, config)?;
        let Some(storage) = fields.get("storage") else { return Ok(plan) };
        let storage = storage.as_array().ok_or_else(|| wrong(expected.to_owned()))?;
        if storage.len() != plan.layers.len() {
            return Err(Error::PlanLength { expected: plan.layers.len(), found: storage.len() });
        }
        let stored = |(cache, name): (&LayerCache, &Value)| {
            let storage = name.as_str().and_then(CacheStorage::parse);
            storage
                .map(|storage| cache.stored(storage))
                .ok_or_else(|| wrong(format!("{name} is no storage; {expected}")))
        };
        let layers: Result<Vec<_>> = plan.layers.iter().zip(storage).map(stored).collect();
        Ok(Self { layers: layers?, ..plan })
    }
}

/// The canonical file form.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{\"num_key_value_heads\": {:?}", self.num_key_value_heads())?;
        if self.stored_layer().is_some() {
            let names: Vec<_> = self.layers.iter().map(|cache| cache.storage.name()).collect();
            write!(f, ", \"storage\": {names:?}")?;
        }
        f.write_str("}")
    }
}
