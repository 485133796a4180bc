//! Typed access to the fields of a `config.json`, with errors that name the field.

use serde_json::{Map, Value};

use super::{Activation, DType};
use crate::family::{AttentionScale, Family, Softcapping};
use crate::{Error, Result};

/// No size in a configuration may exceed this, so that products of three sizes fit 64 bits.
const LARGEST_SIZE: u64 = 1 << 20;
/// `vocab_size`, `intermediate_size`, `max_position_embeddings` can be larger than a head or layer count.
const LARGEST_LENGTH: u64 = 1 << 31;
/// More layers than any model has; bounds what a hostile file can make us allocate.
const MOST_LAYERS: u64 = 1 << 14;

/// A field, whether a value of it changes nothing, and what is expected.
type NotFollowed = (&'static str, fn(&Value) -> bool, &'static str);

/// Fields by which transformers 5 computes, or caches, something else in one of the families (`masking_utils.py`,
/// `cache_utils.py`, `modeling_gemma.py`, `modeling_rope_utils.py`).
const NOT_FOLLOWED: [NotFollowed; 4] = [
    ("is_causal", |value| value == true, "true or absent: attention to later tokens is not supported"),
    (
        "use_bidirectional_attention",
        |value| value.is_null() || value == false,
        "false or absent: attention to later tokens is not supported",
    ),
    ("attention_chunk_size", Value::is_null, "null or absent: chunked attention is not supported"),
    ("kv_sharing_modes", Value::is_null, "null or absent: K/V caches shared by layers are not supported"),
];

pub(super) struct Fields<'a> {
    json: &'a Map<String, Value>,
    /// Names of fields, and what the family calls them.
    names: &'static [(&'static str, &'static str)],
}

impl<'a> Fields<'a> {
    pub(super) fn new(json: &'a Value) -> Result<Self> {
        json.as_object()
            .map(|json| Self { json, names: &[] })
            .ok_or_else(|| Error::Syntax { what: "config.json", detail: "expected an object { ... }".to_owned() })
    }

    /// The same under the family's own names.
    pub(super) fn of(self, family: &'static Family) -> Self {
        Self { names: family.field_names, ..self }
    }

    /// What the family calls a field.
    pub(super) fn name<'n>(&self, field: &'n str) -> &'n str {
        self.names.iter().find(|(name, _)| *name == field).map_or(field, |(_, own)| own)
    }

    fn value(&self, field: &str) -> Option<&'a Value> {
        self.json.get(self.name(field))
    }

    /// The field, absent and `null` being the same.
    pub(super) fn get(&self, field: &str) -> Option<&'a Value> {
        self.value(field).filter(|value| !value.is_null())
    }

    pub(super) fn is_null(&self, field: &str) -> bool {
        self.value(field).is_some_and(Value::is_null)
    }

    pub(super) fn missing(&self, field: &str) -> Error {
        Error::Config { field: self.name(field).to_owned(), detail: "is missing".to_owned() }
    }

    pub(super) fn wrong(&self, field: &str, expected: &str) -> Error {
        let found = self.value(field).map_or_else(|| "nothing".to_owned(), brief);
        Error::Config { field: self.name(field).to_owned(), detail: format!("must be {expected}; found {found}") }
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

    pub(super) fn number(&self, field: &str) -> Result<Option<f64>> {
        self.get(field).map(|v| v.as_f64().ok_or_else(|| self.wrong(field, "a number"))).transpose()
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
        family: &Family,
        num_hidden_layers: usize,
        num_attention_heads: usize,
    ) -> Result<Vec<usize>> {
        let field = "num_key_value_heads";
        if family.merged.is_some() {
            return self.as_many_as_query_heads(family, num_hidden_layers, num_attention_heads);
        }
        let absent = family.defaults.num_key_value_heads.filter(|_| !self.is_null(field));
        let check = |heads: usize, field: &str| {
            if num_attention_heads.is_multiple_of(heads) {
                return Ok(heads);
            }
            let detail = format!("must divide num_attention_heads {num_attention_heads}; found {heads}");
            Err(Error::Config { field: field.to_owned(), detail })
        };
        let global = match (self.size(field)?, absent) {
            (Some(heads), _) => check(heads, field)?,
            (None, Some(default)) => check(default, field).map_err(|_| {
                let detail = format!(
                    "is absent, and the {default} of a {} does not divide num_attention_heads {num_attention_heads}; \
                     write the count",
                    family.model_type
                );
                Error::Config { field: field.to_owned(), detail }
            })?,
            (None, None) => num_attention_heads,
        };
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
            // transformers gives a layer any field of its own
            if let Some((other, value)) =
                own.json.iter().find(|(name, v)| name.as_str() != field && self.json.get(*name) != Some(*v))
            {
                let detail = format!("is {}; only {field} can differ by layer", brief(value));
                return Err(Error::Config { field: format!("per_layer_config.{key}.{other}"), detail });
            }
        }
        Ok(heads)
    }

    /// Of a family whose class knows no K/V heads; it ignores the fields, which mean another model.
    fn as_many_as_query_heads(&self, family: &Family, layers: usize, num_attention_heads: usize) -> Result<Vec<usize>> {
        for field in ["num_key_value_heads", "per_layer_config"] {
            if self.get(field).is_some_and(|value| value.as_u64() != Some(num_attention_heads as u64)) {
                let expected = format!("absent: a {} has as many K/V heads as query heads", family.model_type);
                return Err(self.wrong(field, &expected));
            }
        }
        Ok(vec![num_attention_heads; layers])
    }

    /// The family, or the one by which we write it: the classes of our modelling file say so.
    pub(super) fn as_written(&self, family: &'static Family) -> &'static Family {
        let ours = |value: &Value| value[0].as_str().is_some_and(|class| class.starts_with("LayerwiseKV"));
        let merged = family.merged.filter(|merged| merged.model_type == family.model_type);
        merged.filter(|_| self.get("architectures").is_some_and(ours)).unwrap_or(family)
    }

    /// The activation of the MLP. Old Gemma files have a `hidden_activation` beside `hidden_act`, which transformers (4.57 and 5)
    /// does not read.
    pub(super) fn activation(&self, family: &Family) -> Result<Activation> {
        let field = family.forward.activation_field;
        match self.text(field)?.unwrap_or(family.defaults.hidden_act) {
            "silu" | "swish" => Ok(Activation::Silu),
            "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeluTanh),
            // Gemma's "gelu" always meant the tanh form (`configuration_gemma.py`)
            "gelu" if family.model_type == "gemma" => Ok(Activation::GeluTanh),
            "gelu" => Ok(Activation::Gelu),
            _ => Err(self.wrong(field, "one of silu, gelu, gelu_pytorch_tanh")),
        }
    }

    /// Factor on the logits of the attention; of `head_dim` in f32, as the forward pass multiplies.
    pub(super) fn attention_scale(&self, scale: AttentionScale, head_dim: usize) -> Result<f64> {
        let power = |value: f64| f64::from(value.powf(-0.5) as f32);
        Ok(match scale {
            AttentionScale::QueryPreAttnScalar(default) => {
                power(self.positive("query_pre_attn_scalar")?.unwrap_or(default))
            }
            AttentionScale::Flagged if self.flag("scale_attn_weights")? == Some(false) => 1.0,
            AttentionScale::HeadDim | AttentionScale::Flagged => power(head_dim as f64),
            AttentionScale::Multiplier => self.positive("attention_multiplier")?.unwrap_or(1.0),
        })
    }

    /// A bound of logits: absent the family's, `null` none.
    pub(super) fn softcapping(&self, field: &str, of: Softcapping) -> Result<Option<f64>> {
        let Softcapping::Field(default) = of else { return Ok(None) };
        let default = default.filter(|_| !self.is_null(field));
        Ok(self.positive(field)?.or(default))
    }
    /// Refuses what would change the forward pass, or the stored weights, in a way that is not followed.
    pub(super) fn refuse_unsupported(&self, family: &Family) -> Result<()> {
        for (field, neutral, expected) in NOT_FOLLOWED {
            if family.runnable && self.json.get(field).is_some_and(|value| !neutral(value)) {
                return Err(self.wrong(field, expected));
            }
        }
        for &(field, value) in family.requires {
            if self.flag(field)?.is_some_and(|found| found != value) {
                return Err(self.wrong(field, &format!("{value} or absent: the other is not supported")));
            }
        }
        let field = "quantization_config";
        let Some(found) = self.get(field) else { return Ok(()) };
        let method = found.get("quant_method").and_then(Value::as_str);
        if method.is_some_and(|method| family.attention_kept_by.contains(&method)) {
            return Ok(());
        }
        let method = method.map_or_else(
            || "without a quant_method".to_owned(),
            |name| format!("with quant_method {}", brief(&Value::from(name))),
        );
        let detail = format!(
            "is set, {method}: quantised weights are not supported; use the model before quantisation, or load this \
             one in transformers, call dequantize() and save it"
        );
        Err(Error::Config { field: field.to_owned(), detail })
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
