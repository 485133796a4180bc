//! `config.json`. What parses can be computed with, and written back for a plan in a form that parses again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mqadapt_core::{ModelConfig, Plan, cost};

fuzz_target!(|json: &[u8]| {
    let Ok(config) = std::str::from_utf8(json).map_err(drop).and_then(|text| ModelConfig::from_json(text).map_err(drop))
    else {
        return;
    };
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
});
