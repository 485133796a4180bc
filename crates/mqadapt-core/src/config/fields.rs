//! Typed access to the fields of a `config.json`, with errors that name the field.

use serde_json::{Map, Value};

use super::{Activation, DType};
use crate::family::Family;
use crate::{Error, Result};

/// No size in a configuration may exceed this, so that products of three sizes fit 64 bits.
const LARGEST_SIZE: u64 = 1 << 20;
/// `vocab_size`, `intermediate_size`, `max_position_embeddings` can be larger than a head or layer count.
const LARGEST_LENGTH: u64 = 1 << 31;
/// More layers than any model has; bounds what a hostile file can make us allocate.
const MOST_LAYERS: u64 = 1 << 14;

pub(super) struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    pub(super) fn new(json: &'a Value) -> Result<Self> {
        json.as_object()
            .map(Self)
            .ok_or_else(|| Error::Syntax { what: "config.json", detail: "expected an object { ... }".to_owned() })
    }

    /// The field, absent and `null` being the same.
    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    pub(super) fn is_null(&self, field: &str) -> bool {
        self.0.get(field).is_some_and(Value::is_null)
    }

    pub(super) fn missing(&self, field: &str) -> Error {
        let _ = self;
        Error::Config { field: field.to_owned(), detail: "is missing".to_owned() }
    }

    pub(super) fn wrong(&self, field: &str, expected: &str) -> Error {
        let found = self.0.get(field).map_or_else(|| "nothing".to_owned(), brief);
        Error::Config { field: field.to_owned(), detail: format!("must be {expected}; found {found}") }
    }

    pub(super) fn text(&self, field: &str) -> Result<Option<&'a str>> {
        self.get(field).map(|v| v.as_str().ok_or_else(|| self.wrong(field, "a string"))).transpose()
    }

    pub(super) fn flag(&self, field: &str) -> Result<Option<bool>> {
        self.get(field).map(|v| v.as_bool().ok_or_else(|| self.wrong(field, "true or false"))).transpose()
    }

    pub(super) fn positive(&self, field: &str) -> Result<Option<f64>> {
        self.get(field)
            .map(|v| {
                v.as_f64().filter(|x| x.is_finite() && *x > 0.0).ok_or_else(|| self.wrong(field, "a positive number"))
            })
            .transpose()
    }

    pub(super) fn size(&self, field: &str) -> Result<Option<usize>> {
        let most = match field {
            "vocab_size" | "intermediate_size" | "max_position_embeddings" | "sliding_window" => LARGEST_LENGTH,
            "num_hidden_layers" => MOST_LAYERS,
            _ => LARGEST_SIZE,
        };
        self.get(field)
            .map(|v| {
                v.as_u64()
                    .filter(|n| (1..=most).contains(n))
                    .and_then(|n| usize::try_from(n).ok())
                    .ok_or_else(|| self.wrong(field, &format!("a whole number from 1 to {most}")))
            })
            .transpose()
    }

    pub(super) fn required_size(&self, field: &str) -> Result<usize> {
        self.size(field)?.ok_or_else(|| self.missing(field))
    }

    /// K/V heads of each layer: the global count, overridden by `per_layer_config` (transformers 5).
    pub(super) fn num_key_value_heads(
        &self,
        num_hidden_layers: usize,
        num_attention_heads: usize,
    ) -> Result<Vec<usize>> {
        let field = "num_key_value_heads";
        let check = |heads: usize, field: &str| {
            if num_attention_heads.is_multiple_of(heads) {
                return Ok(heads);
            }
            let detail = format!("must divide num_attention_heads {num_attention_heads}; found {heads}");
            Err(Error::Config { field: field.to_owned(), detail })
        };
        let global = check(self.size(field)?.unwrap_or(num_attention_heads), field)?;
        let mut heads = vec![global; num_hidden_layers];
        let Some(per_layer) = self.get("per_layer_config") else { return Ok(heads) };
        let entries = per_layer.as_object().ok_or_else(|| self.wrong("per_layer_config", "an object of layers"))?;
        for (key, entry) in entries {
            let place = format!("per_layer_config.{key}.{field}");
            let layer = key.parse::<usize>().ok().and_then(|idx| heads.get_mut(idx)).ok_or_else(|| Error::Config {
                field: format!("per_layer_config.{key}"),
                detail: format!("must name a layer from 0 to {}", num_hidden_layers - 1),
            })?;
            let own = Self::new(entry)
                .map_err(|_| Error::Config { field: place.clone(), detail: "must be in an object".to_owned() })?;
            if let Some(own) = own.size(field)? {
                *layer = check(own, &place)?;
            }
        }
        Ok(heads)
    }

    pub(super) fn activation(&self, family: &Family) -> Result<Activation> {
        // old Gemma files say hidden_activation; their hidden_act "gelu" always meant the tanh form
        let field = if self.get("hidden_activation").is_some() { "hidden_activation" } else { "hidden_act" };
        match self.text(field)?.unwrap_or(family.defaults.hidden_act) {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
            "gelu" if family.forward.norm_weight_plus_one => Ok(Activation::GeluTanh),
            "gelu" => Ok(Activation::Gelu),
            _ => Err(self.wrong(field, "one of silu, gelu, gelu_pytorch_tanh")),
        }
    }

    /// The window of each layer (`configuration_mistral.py`, `configuration_qwen2.py`).
    pub(super) fn sliding_windows(&self, family: &Family, num_hidden_layers: usize) -> Result<Vec<Option<usize>>> {
        let defaults = &family.defaults;
        let unset = if self.is_null("sliding_window") { None } else { defaults.sliding_window };
        let window = self.size("sliding_window")?.or(unset);
        let knows_windows = defaults.sliding_window.is_some();
        let flagged = !defaults.sliding_window_needs_flag || self.flag("use_sliding_window")?.unwrap_or(false);
        let Some(window) = window.filter(|_| knows_windows && flagged) else {
            return Ok(vec![None; num_hidden_layers]);
        };
        if let Some(types) = self.get("layer_types").filter(|_| defaults.sliding_window_needs_flag) {
            let types = types.as_array().filter(|t| t.len() == num_hidden_layers);
            let types = types.ok_or_else(|| self.wrong("layer_types", "a list with one entry per layer"))?;
            return types
                .iter()
                .map(|kind| match kind.as_str() {
                    Some("full_attention") => Ok(None),
                    Some("sliding_attention") => Ok(Some(window)),
                    _ => Err(self.wrong("layer_types", "a list of full_attention and sliding_attention")),
                })
                .collect();
        }
        let first = if defaults.sliding_window_needs_flag {
            // 0 is a legal max_window_layers: every layer has a window
            let first = self.get("max_window_layers").map_or(Some(28), Value::as_u64);
            first.ok_or_else(|| self.wrong("max_window_layers", "a whole number"))?
        } else {
            0
        };
        Ok((0..num_hidden_layers).map(|idx| (idx as u64 >= first).then_some(window)).collect())
    }

    pub(super) fn dtype(&self) -> Option<DType> {
        let value = self.get("dtype").or_else(|| self.get("torch_dtype"))?;
        DType::parse(value.as_str()?)
    }
}

/// A value for an error message, cut short.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(80) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}
