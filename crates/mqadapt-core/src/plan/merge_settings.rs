//! How the heads of a plan are merged, as a plan file says it. In: the fields `method` and `options`; out: typed settings.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{Error, Result};

/// The merge method of a plan file and its options; `None` where the file does not say.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MergeSettings {
    /// The merge method.
    pub method: Option<String>,
    /// Its options.
    pub options: MergeSettingsOptions,
}

/// The options of a merge method, under the names of the keyword arguments in Python.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MergeSettingsOptions {
    /// Seed of methods that draw random numbers, and of the draw of windows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Calibration text: a file, relative to the folder of the plan file, or a data set of the hub.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<String>,
    /// Name of the text field in a record.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration_field: Option<String>,
    /// Number of drawn tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration_tokens: Option<u64>,
    /// Window lengths in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration_context: Option<Vec<u64>>,
    /// Contexts that the result is optimised for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_context: Option<Vec<u64>>,
    /// Statistics file, relative to the folder of the plan file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stats: Option<String>,
    /// Refit layer by layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequential: Option<bool>,
    /// Gradient steps before the refit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refine: Option<u64>,
    /// Fast rotary pairs of every layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fast_pairs: Option<u64>,
    /// Whether heads that are not neighbours may share a group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regroup: Option<bool>,
    // a manifest records these results beside the options
    #[serde(skip_serializing)]
    initializer_range: Option<f64>,
    #[serde(skip_serializing)]
    calibration_fingerprint: Option<String>,
}

impl MergeSettings {
    /// The settings of the fields `method` and `options`.
    pub(super) fn from_fields(method: Option<&Value>, options: Option<&Value>) -> Result<Self> {
        let wrong = |detail: String| Error::Syntax { what: "plan", detail };
        let method = match method {
            None => None,
            Some(Value::String(name)) => Some(name.clone()),
            Some(other) => return Err(wrong(format!("\"method\" is the name of a merge method; found {other}"))),
        };
        let options = match options {
            None => MergeSettingsOptions::default(),
            Some(options) if !options.is_object() => {
                return Err(wrong(format!("\"options\" is an object of options; found {options}")));
            }
            Some(options) => MergeSettingsOptions::deserialize(options)
                .map_err(|error| wrong(format!("\"options\" cannot be read: {error}")))?,
        };
        Ok(Self { method, options })
    }

    /// The settings that the file has, flat, by their names.
    #[must_use]
    pub fn fields(&self) -> Map<String, Value> {
        let mut fields = Map::new();
        if let Some(method) = &self.method {
            fields.insert("method".to_owned(), Value::from(method.as_str()));
        }
        // every field is a number, a string or a list of them, so this cannot fail
        if let Ok(Value::Object(options)) = serde_json::to_value(&self.options) {
            fields.extend(options);
        }
        fields
    }
}
