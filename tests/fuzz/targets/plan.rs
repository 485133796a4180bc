//! A plan: the grammar, and the content of a plan file. What parses is legal.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mqadapt_core::{ModelConfig, Plan};

fuzz_target!(|text: &str| {
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
});
