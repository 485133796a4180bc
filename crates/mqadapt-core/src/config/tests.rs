use serde_json::{Value, json};

use super::*;

fn llama() -> Value {
    json!({ "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 100, "num_hidden_layers": 3,
            "num_attention_heads": 8, "num_key_value_heads": 4 })
}

fn with(field: &str, value: Value) -> Value {
    let mut json = llama();
    json[field] = value;
    json
}

#[test]
fn defaults_are_those_of_transformers() {
    let config = ModelConfig::from_value(llama()).unwrap();
    assert_eq!((config.head_dim, config.rope.theta, config.max_position_embeddings), (8, 10_000.0, 2048));
    assert!(!config.tie_word_embeddings);
    let mut gemma = llama();
    gemma["model_type"] = json!("gemma");
    let gemma = ModelConfig::from_value(gemma).unwrap();
    assert_eq!((gemma.head_dim, gemma.hidden_act), (256, Activation::GeluTanh));
    assert!(gemma.tie_word_embeddings);
}

#[test]
fn a_bad_field_is_named() {
    for (field, value) in [
        ("hidden_size", json!(0)),
        ("hidden_size", json!(-4)),
        ("hidden_size", json!(1.5)),
        ("hidden_size", json!(u64::MAX)),
        ("num_hidden_layers", json!(1_000_000)),
        ("head_dim", json!(7)),
        ("num_key_value_heads", json!(3)),
        ("rms_norm_eps", json!("small")),
        ("hidden_act", json!("relu")),
        ("rope_scaling", json!({ "rope_type": "yarn", "factor": 2.0 })),
        ("per_layer_config", json!({ "9": { "num_key_value_heads": 1 } })),
        ("per_layer_config", json!({ "1": { "num_key_value_heads": 5 } })),
        ("per_layer_config", json!([1])),
    ] {
        let message = ModelConfig::from_value(with(field, value.clone())).unwrap_err().to_string();
        assert!(message.contains(field) || message.contains("rope_type"), "{field} = {value}: {message}");
    }
}

#[test]
fn an_unknown_model_type_lists_the_known() {
    let message = ModelConfig::from_value(with("model_type", json!("bert"))).unwrap_err().to_string();
    assert!(message.contains("bert") && message.contains("gemma"), "{message}");
}

#[test]
fn a_rewritten_config_reads_back() {
    let source = ModelConfig::from_value(with("rope_theta", json!(5000.0))).unwrap();
    for heads in [[4, 4, 4], [2, 2, 2], [4, 1, 2], [1, 1, 2]] {
        let written = source.with_num_key_value_heads(&heads, "modeling_x");
        let read = ModelConfig::from_value(written.json.clone()).unwrap();
        assert_eq!(read.num_key_value_heads, heads);
        assert_eq!(read.rope, source.rope);
        let mixed = heads.iter().any(|h| *h != heads[0]);
        assert_eq!(written.json.get("auto_map").is_some(), mixed);
        assert_eq!(written.json.get("per_layer_config").is_some(), mixed);
        // converting again to layers that are alike leaves nothing of ours behind
        let uniform = read.with_num_key_value_heads(&[1, 1, 1], "modeling_x").json;
        assert!(uniform.get("auto_map").is_none() && uniform["architectures"] == json!(["LlamaForCausalLM"]));
    }
}

#[test]
fn llama3_frequencies() {
    // transformers' _compute_llama3_parameters with the values of Llama-3.2-1B, head_dim 64, pairs 0, 15 and 31
    let scaling = json!({ "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192, "rope_theta": 500_000.0 });
    let mut json = with("rope_parameters", scaling);
    json["head_dim"] = json!(64);
    let inv_freq = ModelConfig::from_value(json).unwrap().rope.inv_freq();
    let plain = |j: i32| 500_000f64.powf(-f64::from(2 * j) / 64.0);
    assert!((inv_freq[0] - 1.0).abs() < 1e-12);
    assert!((inv_freq[31] - plain(31) / 32.0).abs() < 1e-15);
    assert!(inv_freq[15] < plain(15) && inv_freq[15] > plain(15) / 32.0);
}

#[test]
fn windows_of_mistral_and_qwen() {
    let mut json = llama();
    json["model_type"] = json!("mistral");
    assert_eq!(ModelConfig::from_value(json.clone()).unwrap().sliding_window, [Some(4096); 3]);
    json["sliding_window"] = Value::Null;
    assert_eq!(ModelConfig::from_value(json.clone()).unwrap().sliding_window, [None; 3]);
    json["model_type"] = json!("qwen2");
    json["sliding_window"] = json!(16);
    assert_eq!(ModelConfig::from_value(json.clone()).unwrap().sliding_window, [None; 3]);
    json["use_sliding_window"] = json!(true);
    json["max_window_layers"] = json!(1);
    assert_eq!(ModelConfig::from_value(json).unwrap().sliding_window, [None, Some(16), Some(16)]);
}
