//! The file of a plan, JSON or YAML. In: its content; out: K/V heads of each layer, and how they are merged.

use std::fmt;

use serde_json::Value;

use super::{MergeSettings, Plan};
use crate::{CacheStorage, Error, LayerCache, ModelConfig, Result};

const EXPECTED: &str = "expected {\"num_key_value_heads\": [one whole number per layer]} or the list alone, and where caches are not stored as computed \"storage\": [one of \"computed\", \"int8\" and \"int4\" per layer]; \"method\" and \"options\" may say how heads are merged";

/// The content of a plan file, which no model was compared with yet.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanDocument {
    heads: Vec<usize>,
    storage: Option<Vec<CacheStorage>>,
    /// How the heads are merged, as far as the file says.
    pub merge: MergeSettings,
}

impl PlanDocument {
    /// Reads the content of a plan file, JSON or YAML: `{"num_key_value_heads": [3, 3, 1, ...]}` or the list alone;
    /// `"storage": ["int4", "computed", ...]` where caches are not stored as computed; `"method"` and `"options"` where it says
    /// how heads are merged. The `mqadapt.json` of a converted checkpoint is a plan file, too.
    ///
    /// # Errors
    /// [`Error::Syntax`].
    pub fn parse(text: &str) -> Result<Self> {
        let wrong = |detail: String| Error::Syntax { what: "plan", detail };
        // JSON is tried first: its messages are better, and only a subset of YAML would be left to check
        let document: Value = if text.trim_start().starts_with(['{', '[']) {
            let list = text.trim_start().starts_with('[');
            serde_json::from_str(text).or_else(|error| {
                let yaml = if list { serde_yaml_ng::from_str(text).ok() } else { None }; // a list of YAML in one line
                yaml.ok_or_else(|| wrong(error.to_string()))
            })?
        } else {
            serde_yaml_ng::from_str(text).map_err(|e| wrong(e.to_string()))?
        };
        let unexpected = || wrong(EXPECTED.to_owned());
        let heads = |entries: &[Value]| -> Result<Vec<usize>> {
            let heads = entries.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok()));
            heads.collect::<Option<_>>().ok_or_else(unexpected)
        };
        if let Some(entries) = document.as_array() {
            return Ok(Self { heads: heads(entries)?, storage: None, merge: MergeSettings::default() });
        }
        let fields = document.as_object().ok_or_else(unexpected)?;
        // a manifest holds the plan beside much else
        let manifest = fields.contains_key("format_version");
        let plan = if manifest { fields.get("plan").and_then(Value::as_object) } else { Some(fields) };
        let plan = plan.ok_or_else(unexpected)?;
        let known = |key: &str| match key {
            "num_key_value_heads" | "storage" => true,
            "method" | "options" => !manifest,
            _ => false,
        };
        if let Some(unknown) = plan.keys().find(|key| !known(key)) {
            return Err(wrong(format!("unknown field '{unknown}'; {EXPECTED}")));
        }
        let entries = plan.get("num_key_value_heads").and_then(Value::as_array).ok_or_else(unexpected)?;
        let stored = |name: &Value| {
            let storage = name.as_str().and_then(CacheStorage::parse);
            storage.ok_or_else(|| wrong(format!("{name} is no storage; {EXPECTED}")))
        };
        let storage = match plan.get("storage") {
            None => None,
            Some(names) => Some(names.as_array().ok_or_else(unexpected)?.iter().map(stored).collect::<Result<_>>()?),
        };
        let merge = MergeSettings::from_fields(fields.get("method"), fields.get("options"))?;
        Ok(Self { heads: heads(entries)?, storage, merge })
    }

    /// The plan for a model.
    ///
    /// # Errors
    /// Those of [`Plan::from_heads`].
    pub fn plan(&self, config: &ModelConfig) -> Result<Plan> {
        let plan = Plan::from_heads(&self.heads, config)?;
        let Some(storage) = &self.storage else { return Ok(plan) };
        if storage.len() != plan.layers.len() {
            return Err(Error::PlanLength { expected: plan.layers.len(), found: storage.len() });
        }
        let layers: Vec<LayerCache> =
            plan.layers.iter().zip(storage).map(|(cache, &storage)| cache.stored(storage)).collect();
        Ok(Plan { layers, ..plan })
    }
}

impl Plan {
    /// The plan of the content of a plan file, as [`PlanDocument::parse`] reads it.
    ///
    /// # Errors
    /// [`Error::Syntax`], and those of [`Self::from_heads`].
    pub fn from_document(text: &str, config: &ModelConfig) -> Result<Self> {
        PlanDocument::parse(text)?.plan(config)
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
