//! `mqadapt.json`. What parses is written back as it was, and its files stay in the folder.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mqadapt_convert::Manifest;

fuzz_target!(|json: &[u8]| {
    if let Ok(manifest) = Manifest::parse(json) {
        assert!(manifest.shards.iter().all(|shard| !shard.name.contains('/') && shard.name != ".."));
        let again = Manifest::parse(manifest.to_json().as_bytes()).expect("what was written parses");
        assert_eq!(again.shards, manifest.shards);
        assert_eq!(again.num_key_value_heads_after, manifest.num_key_value_heads_after);
    }
});
