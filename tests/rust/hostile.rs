//! Every parser on bytes that nobody would write on purpose: the fuzz targets' corpus, mutated. Quick and repeatable; the fuzz
//! targets in `tests/fuzz` look further.

use std::fs;
use std::path::Path;

use mqadapt_checkpoint::{Header, check_gguf_bytes, index_shards};
use mqadapt_convert::Manifest;
use mqadapt_core::{ModelConfig, Plan};

/// Mutations of each seed.
const ROUNDS: u64 = 2_000;

/// Calls `parse` with the seeds of a target and with mutations of them; it must return, whatever it gets.
fn survives(target: &str, parse: impl Fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/corpus").join(target);
    let mut seeds: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| fs::read(entry.unwrap().path()).unwrap()).collect();
    seeds.sort();
    assert!(!seeds.is_empty());
    let mut random = 1;
    for seed in &seeds {
        parse(seed);
        for _ in 0..ROUNDS {
            parse(&mutated(seed, &mut random));
        }
    }
}

/// One to four changes: another byte, another digit, a cut, a repetition, large numbers.
fn mutated(seed: &[u8], random: &mut u64) -> Vec<u8> {
    let mut next = |below: usize| {
        *random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*random >> 33) as usize % below.max(1)
    };
    let mut bytes = seed.to_vec();
    for _ in 0..=next(4) {
        let at = next(bytes.len());
        let end = at + next(bytes.len() - at);
        match next(6) {
            0 => bytes.truncate(at),
            1 => drop(
                bytes.splice(at..at, seed[at.min(seed.len())..end.min(seed.len()).max(at.min(seed.len()))].to_vec()),
            ),
            2 => drop(bytes.splice(at..at, *b"18446744073709551615")),
            3 => bytes.iter_mut().skip(at).take(8).for_each(|byte| *byte = 0xff),
            4 => drop(bytes.drain(at..end)),
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = next(256) as u8;
                }
            }
        }
    }
    bytes
}

#[test]
fn safetensors_headers() {
    survives("safetensors", |file| {
        let Some((prefix, rest)) = file.split_first_chunk::<8>() else { return };
        let len = usize::try_from(u64::from_le_bytes(*prefix)).unwrap_or(usize::MAX);
        if let Some(Ok(header)) = rest.get(..len).map(|json| Header::parse(json, file.len() as u64)) {
            let end = header.entries.iter().fold(header.data_start, |end, entry| end + entry.bytes);
            assert_eq!(end, file.len() as u64);
        }
    });
}

#[test]
fn indices() {
    survives("index", |json| {
        for shard in index_shards(json).unwrap_or_default() {
            assert!(!shard.contains('/') && shard != "..", "{shard:?}");
        }
    });
}

#[test]
fn configurations() {
    survives("config", |json| {
        if let Ok(config) = ModelConfig::from_json(&String::from_utf8_lossy(json)) {
            let _ = config.with_num_key_value_heads(&config.num_key_value_heads, "modeling_mqadapt");
        }
    });
}

#[test]
fn plans() {
    let config = ModelConfig::from_json(
        r#"{"model_type": "llama", "hidden_size": 48, "intermediate_size": 8, "vocab_size": 9,
            "num_hidden_layers": 30, "num_attention_heads": 12}"#,
    )
    .unwrap();
    survives("plan", |bytes| {
        let text = String::from_utf8_lossy(bytes);
        for plan in [Plan::parse(&text, &config), Plan::from_document(&text, &config)].into_iter().flatten() {
            assert!(plan.num_key_value_heads().iter().all(|heads| 12 % heads == 0));
        }
    });
}

#[test]
fn manifests() {
    survives("manifest", |json| {
        if let Ok(manifest) = Manifest::parse(json) {
            assert!(manifest.shards.iter().all(|shard| !shard.name.contains('/')));
        }
    });
}

#[test]
fn gguf_files() {
    survives("gguf", |file| {
        let _ = check_gguf_bytes(file);
    });
}
