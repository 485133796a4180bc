//! `config.json` from the metadata and tensors of a GGUF file of architecture `llama`.
//!
//! Keys: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>; fields: transformers' `configuration_llama.py`.

use mqadapt_core::{DType, ModelConfig};
use serde_json::{Map, Value, json};

use super::header::Header;
use super::metadata::Metadata;
use super::problem::{Parsed, Problem};
use super::rope;

/// The only architecture read: `LlamaForCausalLM`, which Mistral, `SmolLM` and others share.
const ARCHITECTURE: &str = "llama";

/// The configuration as Hugging Face writes it, and as it is computed with.
///
/// `rope_factors` are the values of `rope_freqs.weight`, `dtype` the type that the weights are read as.
pub(super) fn model_config(header: &Header, rope_factors: Option<&[f32]>, dtype: DType) -> Parsed<ModelConfig> {
    let metadata = &header.metadata;
    let sizes = Sizes::read(header)?;
    let key = "llama.rope.freq_base";
    let theta = metadata.float(key)?.unwrap_or(10_000.0);
    if theta <= 0.0 {
        return Err(Problem::key(key, format!("must be positive; found {theta}")));
    }
    let scaling = rope::scaling(metadata, rope_factors, theta, sizes.head_dim)?;
    let mut rope_parameters = scaling.as_object().cloned().unwrap_or_else(|| object(&json!({"rope_type": "default"})));
    rope_parameters.insert("rope_theta".to_owned(), json!(theta));

    let key = "llama.attention.layer_norm_rms_epsilon";
    let rms_norm_eps = metadata.float(key)?.ok_or_else(|| Problem::missing_key(key))?;
    let widest = sizes.num_key_value_heads.iter().copied().max().unwrap_or_default();
    let mut json = object(&json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": has_bias(header, &["attn_q", "attn_k", "attn_v", "attn_output"]),
        "attention_dropout": 0.0,
        "bos_token_id": token_id(metadata, "bos")?,
        "eos_token_id": token_id(metadata, "eos")?,
        "pad_token_id": token_id(metadata, "padding")?,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": sizes.intermediate_size,
        "max_position_embeddings": metadata.required_integer("llama.context_length")?,
        "mlp_bias": has_bias(header, &["ffn_gate", "ffn_up", "ffn_down"]),
        "num_attention_heads": sizes.num_attention_heads,
        "num_hidden_layers": sizes.num_hidden_layers,
        "num_key_value_heads": widest,
        "rms_norm_eps": rms_norm_eps,
        // transformers 5 reads the last, 4.57 and other engines the first two
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": rope_parameters,
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
    ModelConfig::from_value(Value::Object(json)).map_err(|error| Problem::new("the metadata", error.to_string()))
}

fn object(value: &Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap_or_default()
}

struct Sizes {
    hidden_size: u64,
    intermediate_size: u64,
    num_hidden_layers: usize,
    num_attention_heads: u64,
    num_key_value_heads: Vec<u64>,
    head_dim: usize,
    vocab_size: usize,
}

impl Sizes {
    fn read(header: &Header) -> Parsed<Self> {
        let metadata = &header.metadata;
        let key = "llama.block_count";
        let layers = metadata.required_integer(key)?;
        // every layer has tensors, so there cannot be more layers than tensors
        let layers = usize::try_from(layers).ok().filter(|layers| (1..=header.tensors.len()).contains(layers));
        let layers = layers.ok_or_else(|| Problem::key(key, "does not agree with the number of tensors"))?;

        let hidden_size = metadata.required_integer("llama.embedding_length")?;
        let query_heads = alike(metadata, "llama.attention.head_count", layers)?;
        let head_dim = head_dim(metadata, hidden_size, query_heads)?;
        let embedding = header.tensor("token_embd.weight");
        let vocab_size = embedding.and_then(|tensor| tensor.shape.first().copied());
        Ok(Self {
            hidden_size,
            intermediate_size: alike(metadata, "llama.feed_forward_length", layers)?,
            num_hidden_layers: layers,
            num_attention_heads: query_heads,
            num_key_value_heads: metadata
                .per_layer("llama.attention.head_count_kv", layers)?
                .unwrap_or_else(|| vec![query_heads; layers]),
            head_dim,
            vocab_size: vocab_size.ok_or_else(|| Problem::tensor("token_embd.weight", "is missing"))?,
        })
    }
}

/// Other architectures, and models that share the name `llama` but not its forward pass or layout.
pub(super) fn refuse_other_models(metadata: &Metadata) -> Parsed<()> {
    let key = "general.architecture";
    let architecture = metadata.text(key)?.ok_or_else(|| Problem::missing_key(key))?;
    if architecture != ARCHITECTURE {
        let detail = format!("is '{}'; supported is '{ARCHITECTURE}' only", architecture.escape_debug());
        return Err(Problem::key(key, detail));
    }
    let key = "llama.expert_count";
    if metadata.integer(key)?.unwrap_or_default() > 0 {
        return Err(Problem::key(key, "says a mixture of experts, which is not supported"));
    }
    let key = "split.count";
    if metadata.integer(key)?.unwrap_or_default() > 1 {
        return Err(Problem::key(key, "says one of several files; join them with llama-gguf-split --merge"));
    }
    Ok(())
}

/// A number that may be written for each layer, but must be the same for all.
fn alike(metadata: &Metadata, key: &str, layers: usize) -> Parsed<u64> {
    let numbers = metadata.per_layer(key, layers)?.ok_or_else(|| Problem::missing_key(key))?;
    let first = numbers.first().copied().ok_or_else(|| Problem::missing_key(key))?;
    if numbers.iter().any(|&number| number != first) {
        return Err(Problem::key(key, "differs between layers, which is not supported"));
    }
    Ok(first)
}

fn head_dim(metadata: &Metadata, hidden_size: u64, query_heads: u64) -> Parsed<usize> {
    let (key, rotated) = ("llama.attention.key_length", "llama.rope.dimension_count");
    let derived = hidden_size.checked_div(query_heads);
    let head_dim = match metadata.integer(key)? {
        Some(length) => Some(length),
        None => metadata.integer(rotated)?.or(derived),
    };
    let head_dim = head_dim.ok_or_else(|| Problem::key("llama.attention.head_count", "must not be 0"))?;
    for key in ["llama.attention.value_length", rotated] {
        if metadata.integer(key)?.is_some_and(|length| length != head_dim) {
            let detail = format!("differs from the {head_dim} values of a key, which is not supported");
            return Err(Problem::key(key, detail));
        }
    }
    usize::try_from(head_dim).map_err(|_| Problem::key(key, format!("is too large: {head_dim}")))
}

/// Whether these modules have biases: all of them in every layer, or none at all, as `LlamaConfig` can say.
fn has_bias(header: &Header, modules: &[&str]) -> bool {
    let is_bias = |name: &str| {
        name.strip_prefix("blk.")
            .and_then(|rest| rest.split_once('.'))
            .is_some_and(|(_, rest)| rest.strip_suffix(".bias").is_some_and(|module| modules.contains(&module)))
    };
    // where only some have one, the list of expected tensors names those that are missing
    header.tensors.iter().any(|tensor| is_bias(&tensor.name))
}

/// The id of a special token, if the file names one.
pub(super) fn token_id(metadata: &Metadata, name: &str) -> Parsed<Option<u64>> {
    metadata.integer(&format!("tokenizer.ggml.{name}_token_id"))
}
