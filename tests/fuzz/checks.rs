//! What each parser of something that a stranger may have written has to hold, whatever the bytes are: it returns, and what
//! it accepts is sound. The fuzz targets and the integration test `hostile` call the same functions.

use std::path::{Component, Path};

use mqadapt_checkpoint::{Header, check_gguf_bytes, index_shards};
use mqadapt_convert::Manifest;
use mqadapt_core::{ModelConfig, Plan, cost};

/// The header of a safetensors file. The bytes are a whole file. What parses must be contiguous and fill the file.
pub fn safetensors(file: &[u8]) {
    let Some((prefix, rest)) = file.split_first_chunk::<8>() else { return };
    let Ok(len) = usize::try_from(u64::from_le_bytes(*prefix)) else { return };
    let Some(json) = rest.get(..len) else { return };
    if let Ok(header) = Header::parse(json, file.len() as u64) {
        let mut end = 0;
        for entry in &header.entries {
            assert_eq!(entry.start, end);
            let bits = entry.shape.iter().product::<usize>() * entry.dtype.bitsize();
            assert_eq!(entry.bytes as usize * 8, bits);
            end += entry.bytes;
        }
        assert_eq!(header.data_start + end, file.len() as u64);
    }
}

/// `model.safetensors.index.json`. Every name that parses stays in its folder.
pub fn index(json: &[u8]) {
    for shard in index_shards(json).unwrap_or_default() {
        let components: Vec<_> = Path::new(&shard).components().collect();
        assert!(matches!(components.as_slice(), [Component::Normal(_)]), "{shard:?}");
    }
}

/// `config.json`. What parses can be computed with, and written back for a plan in a form that parses again.
pub fn config(json: &[u8]) {
    let Ok(text) = std::str::from_utf8(json) else { return };
    let Ok(config) = ModelConfig::from_json(text) else { return };
    if config.num_hidden_layers > 64 {
        return; // the same, and slow
    }
    let _ = (config.tensors(), cost::parameters(&config, &Plan::keep(&config)));
    let Ok(plan) = Plan::parse("mqa:all", &config) else { return };
    let _ = cost::kv_bytes_per_token(&config, &plan, 2);
    let heads = Plan::parse("mqa:last1", &config).map(|plan| plan.num_key_value_heads()).unwrap_or_default();
    let planned = config.with_num_key_value_heads(&heads, "modeling_mqadapt");
    let again = ModelConfig::from_json(&planned.json.to_string()).expect("what was written parses");
    assert_eq!(again.num_key_value_heads, heads);
}

/// A plan: the grammar, and the content of a plan file. What parses is legal.
pub fn plan(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let config = ModelConfig::from_json(
        r#"{"model_type": "llama", "hidden_size": 48, "intermediate_size": 8, "vocab_size": 9,
            "num_hidden_layers": 30, "num_attention_heads": 12}"#,
    )
    .expect("a configuration");
    for plan in [Plan::parse(text, &config), Plan::from_document(text, &config)].into_iter().flatten() {
        let heads = plan.num_key_value_heads();
        assert_eq!(heads.len(), 30);
        assert!(heads.iter().all(|own| 12 % own == 0));
        assert_eq!(Plan::from_heads(&heads, &config), Ok(plan));
    }
}

/// `mqadapt.json`. What parses is written back as it was, and its files stay in the folder.
pub fn manifest(json: &[u8]) {
    if let Ok(manifest) = Manifest::parse(json) {
        assert!(manifest.shards.iter().all(|shard| !shard.name.contains('/') && shard.name != ".."));
        let again = Manifest::parse(manifest.to_json().as_bytes()).expect("what was written parses");
        assert_eq!(again.shards, manifest.shards);
        assert_eq!(again.num_key_value_heads_after, manifest.num_key_value_heads_after);
    }
}

/// A GGUF file: header, metadata, tensors of every type, and the tokenizer that its metadata describes.
pub fn gguf(file: &[u8]) {
    let _ = check_gguf_bytes(file);
}
