//! Every parser on bytes that nobody would write on purpose: the checks of the fuzz targets on their corpus, as it is and
//! mutated. Quick and repeatable; the fuzz targets in `tests/fuzz`, guided by coverage, look further.

use std::fs;
use std::path::Path;

#[path = "../fuzz/checks.rs"]
mod checks;

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
    survives("safetensors", checks::safetensors);
}

#[test]
fn indices() {
    survives("index", checks::index);
}

#[test]
fn configurations() {
    survives("config", checks::config);
}

#[test]
fn plans() {
    survives("plan", checks::plan);
}

#[test]
fn manifests() {
    survives("manifest", checks::manifest);
}

#[test]
fn gguf_files() {
    survives("gguf", checks::gguf);
}
