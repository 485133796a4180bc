//! `config.json` from the metadata and tensors of a GGUF file.
//!
//! In: a header, its architecture, the tables of `RoPE`. Out: the fields that all architectures share; `architecture` has the
//! others. Keys: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>; fields: transformers' `configuration_*.py`.

use mqadapt_core::{DType, ModelConfig, family};
use serde_json::{Map, Value, json};

use super::architecture::Architecture;
use super::described::{Model, Sizes, Tables, object, token_id};
use super::header::Header;
use super::metadata::ModelKeys;
use super::problem::{Parsed, Problem};

/// The configuration as Hugging Face writes it, and as it is computed with; `dtype` is the type that the weights are read as.
pub(super) fn model_config(
    header: &Header,
    architecture: &'static Architecture,
    tables: &Tables,
    dtype: DType,
) -> Parsed<ModelConfig> {
    let keys = ModelKeys { metadata: &header.metadata, architecture: architecture.name };
    let sizes = Sizes::read(header, keys, architecture.partly_rotated)?;
    let model = Model { header, keys, sizes, tables };
    let mut json = shared_fields(&model, architecture, dtype)?;
    for (name, value) in (architecture.fields)(&model)? {
        match value {
            Value::Null if json.contains_key(&name) => drop(json.remove(&name)),
            value => drop(json.insert(name, value)),
        }
    }
    let names = family::known(architecture.model_type).map_or(&[][..], |family| family.field_names);
    for (name, own) in names {
        if let Some(value) = json.remove(*name) {
            json.insert((*own).to_owned(), value);
        }
    }
    ModelConfig::from_value(Value::Object(json)).map_err(|error| Problem::new("the metadata", error.to_string()))
}

fn shared_fields(model: &Model, architecture: &Architecture, dtype: DType) -> Parsed<Map<String, Value>> {
    let Model { header, keys, sizes, .. } = model;
    let name = architecture.norm_eps;
    let rms_norm_eps = keys.float(name)?.ok_or_else(|| keys.missing(name))?;
    let widest = sizes.num_key_value_heads.iter().copied().max().unwrap_or_default();
    let mut json = object(json!({
        "architectures": [architecture.class],
        "model_type": architecture.model_type,
        "attention_dropout": 0.0,
        "bos_token_id": token_id(keys.metadata, "bos")?,
        "eos_token_id": token_id(keys.metadata, "eos")?,
        "pad_token_id": token_id(keys.metadata, "padding")?,
        "head_dim": sizes.head_dim,
        "hidden_size": sizes.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate_size,
        "max_position_embeddings": keys.required_integer("context_length")?,
        "num_attention_heads": sizes.num_attention_heads,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_key_value_heads": widest,
        "rms_norm_eps": rms_norm_eps,
        "tie_word_embeddings": header.tensor("output.weight").is_none(),
        "dtype": dtype.name(),
        "use_cache": true,
        "vocab_size": sizes.vocab_size,
    }));
    let differing = sizes.num_key_value_heads.iter().enumerate().filter(|(_, own)| **own != widest);
    let per_layer: Map<_, _> =
        differing.map(|(layer, own)| (format!("{layer:02}"), json!({ "num_key_value_heads": own }))).collect();
    if !per_layer.is_empty() {
        json.insert("per_layer_config".to_owned(), Value::Object(per_layer));
    }
    Ok(json)
}
