//! `model.safetensors.index.json`. Every name that parses stays in its folder.
#![no_main]

use std::path::{Component, Path};

use libfuzzer_sys::fuzz_target;

fuzz_target!(|json: &[u8]| {
    for shard in mqadapt_checkpoint::index_shards(json).unwrap_or_default() {
        let components: Vec<_> = Path::new(&shard).components().collect();
        assert!(matches!(components.as_slice(), [Component::Normal(_)]), "{shard:?}");
    }
});
