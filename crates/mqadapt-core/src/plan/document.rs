//! The file of a plan, JSON or YAML. In: its content and the model's configuration; out: a plan.

use std::fmt;

use serde_json::Value;

use super::Plan;
use crate::{Error, ModelConfig, Result};

impl Plan {
    /// Reads the content of a plan file, JSON or YAML: `{"num_key_value_heads": [3, 3, 1, ...]}`.
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
        let expected = "expected {\"num_key_value_heads\": [one whole number per layer]}";
        let fields = document.as_object().ok_or_else(|| wrong(expected.to_owned()))?;
        if let Some(unknown) = fields.keys().find(|key| *key != "num_key_value_heads") {
            return Err(wrong(format!("unknown field '{unknown}'; {expected}")));
        }
        let entries =
            fields.get("num_key_value_heads").and_then(Value::as_array).ok_or_else(|| wrong(expected.to_owned()))?;
        let heads: Option<Vec<_>> = entries.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok())).collect();
        Self::from_heads(&heads.ok_or_else(|| wrong(expected.to_owned()))?, config)
    }
}

/// The canonical file form.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{\"num_key_value_heads\": {:?}}}", self.num_key_value_heads())
    }
}
