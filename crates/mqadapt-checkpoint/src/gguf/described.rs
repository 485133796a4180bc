//! What a header says of a model, from which its configuration is made. In: the metadata and the list of tensors. Out: the sizes
//! that all architectures have, and what an architecture reads besides.

use serde_json::{Map, Value};

use super::header::Header;
use super::metadata::{Metadata, ModelKeys};
use super::problem::{Parsed, Problem};

/// What a configuration is made of.
pub(super) struct Model<'a> {
    pub header: &'a Header,
    pub keys: ModelKeys<'a>,
    pub sizes: Sizes,
    pub tables: &'a Tables,
}

/// The tensors of a file that say something about `RoPE`.
#[derive(Debug, Default)]
pub(super) struct Tables {
    /// `rope_freqs.weight`: one divisor per frequency.
    pub divisors: Option<Vec<f32>>,
    /// `rope_factors_short.weight` and `rope_factors_long.weight`: those of texts up to the original context, and of longer ones.
    pub short: Option<Vec<f32>>,
    pub long: Option<Vec<f32>>,
}

/// The fields of a `json!({ ... })`.
pub(super) fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(fields) => fields,
        _ => Map::new(),
    }
}

impl Model<'_> {
    /// Whether these modules have biases: all of them in every layer, or none at all, as a configuration can say.
    pub(super) fn has_bias(&self, modules: &[&str]) -> bool {
        let is_bias = |name: &str| {
            name.strip_prefix("blk.")
                .and_then(|rest| rest.split_once('.'))
                .is_some_and(|(_, rest)| rest.strip_suffix(".bias").is_some_and(|module| modules.contains(&module)))
        };
        // where only some have one, the list of expected tensors names those that are missing
        self.header.tensors.iter().any(|tensor| is_bias(&tensor.name))
    }
}

/// The sizes that all architectures have.
pub(super) struct Sizes {
    pub hidden_size: u64,
    pub intermediate_size: u64,
    pub num_hidden_layers: usize,
    pub num_attention_heads: u64,
    pub num_key_value_heads: Vec<u64>,
    pub head_dim: usize,
    pub vocab_size: usize,
}

impl Sizes {
    pub(super) fn read(header: &Header, keys: ModelKeys, partly_rotated: bool) -> Parsed<Self> {
        let layers = keys.required_integer("block_count")?;
        // every layer has tensors, so there cannot be more layers than tensors
        let layers = usize::try_from(layers).ok().filter(|layers| (1..=header.tensors.len()).contains(layers));
        let layers = layers.ok_or_else(|| keys.problem("block_count", "does not agree with the number of tensors"))?;

        let hidden_size = keys.required_integer("embedding_length")?;
        let query_heads = alike(keys, "attention.head_count", layers)?;
        let embedding = header.tensor("token_embd.weight");
        let vocab_size = embedding.and_then(|tensor| tensor.shape.first().copied());
        Ok(Self {
            hidden_size,
            intermediate_size: alike(keys, "feed_forward_length", layers)?,
            num_hidden_layers: layers,
            num_attention_heads: query_heads,
            num_key_value_heads: keys
                .per_layer("attention.head_count_kv", layers)?
                .unwrap_or_else(|| vec![query_heads; layers]),
            head_dim: head_dim(keys, hidden_size, query_heads, partly_rotated)?,
            vocab_size: vocab_size.ok_or_else(|| Problem::tensor("token_embd.weight", "is missing"))?,
        })
    }
}

/// A number that may be written for each layer, but must be the same for all.
fn alike(keys: ModelKeys, name: &str, layers: usize) -> Parsed<u64> {
    let numbers = keys.per_layer(name, layers)?.ok_or_else(|| keys.missing(name))?;
    let first = numbers.first().copied().ok_or_else(|| keys.missing(name))?;
    if numbers.iter().any(|&number| number != first) {
        return Err(keys.problem(name, "differs between layers, which is not supported"));
    }
    Ok(first)
}

fn head_dim(keys: ModelKeys, hidden_size: u64, query_heads: u64, partly_rotated: bool) -> Parsed<usize> {
    let rotated = Some("rope.dimension_count").filter(|_| !partly_rotated);
    let length = match (keys.integer("attention.key_length")?, rotated) {
        (None, Some(rotated)) => keys.integer(rotated)?,
        (length, _) => length,
    };
    let length = length.or(hidden_size.checked_div(query_heads));
    let length = length.ok_or_else(|| keys.problem("attention.head_count", "must not be 0"))?;
    for name in ["attention.value_length"].into_iter().chain(rotated) {
        if keys.integer(name)?.is_some_and(|own| own != length) {
            let detail = format!("differs from the {length} values of a key, which is not supported");
            return Err(keys.problem(name, detail));
        }
    }
    usize::try_from(length).map_err(|_| keys.problem("attention.key_length", format!("is too large: {length}")))
}

/// The id of a special token, if the file names one.
pub(super) fn token_id(metadata: &Metadata, name: &str) -> Parsed<Option<u64>> {
    metadata.integer(&format!("tokenizer.ggml.{name}_token_id"))
}
