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

/// The rotary embedding of layer 0.
fn rope(config: &ModelConfig) -> &Rope {
    config.rope[0].as_ref().unwrap()
}

#[test]
fn defaults_are_those_of_transformers() {
    let config = ModelConfig::from_value(llama()).unwrap();
    assert_eq!((config.head_dim, rope(&config).theta, config.max_position_embeddings), (8, 10_000.0, 2048));
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
        ("rope_scaling", json!({ "rope_type": "proportional", "factor": 2.0 })),
        ("rope_scaling", json!({ "rope_type": "yarn" })),
        (
            "rope_scaling",
            json!({ "rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0, 1.0, 1.0, 1.0] }),
        ),
        ("rope_scaling", json!({ "rope_type": "dynamic" })),
        (
            "rope_scaling",
            json!({ "rope_type": "longrope", "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [1.0, 1.0, 1.0] }),
        ),
        ("rope_scaling", json!({ "rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5 })),
        ("per_layer_config", json!({ "9": { "num_key_value_heads": 1 } })),
        ("per_layer_config", json!({ "1": { "num_key_value_heads": 5 } })),
        ("per_layer_config", json!([1])),
        ("per_layer_config", json!({ "1": { "num_key_value_heads": 2, "head_dim": 4 } })),
        ("is_causal", json!(false)),
        ("is_causal", Value::Null),
        ("use_bidirectional_attention", json!(true)),
        ("partial_rotary_factor", json!(0.5)),
        ("attention_chunk_size", json!(8)),
        ("sliding_window", json!(8)),
        ("layer_types", json!(["full_attention", "sliding_attention", "full_attention"])),
        ("quantization_config", json!({ "quant_method": "gptq", "bits": 4 })),
        ("rope_parameters", json!({ "full_attention": { "rope_type": "default" } })),
        ("rope_scaling", json!({ "rope_type": 5 })),
        ("rope_scaling", json!({ "rope_type": "default", "type": "linear", "factor": 2.0 })),
    ] {
        let message = ModelConfig::from_value(with(field, value.clone())).unwrap_err().to_string();
        let named = [field, "rope_type", "partial_rotary_factor"].iter().any(|name| message.contains(name));
        assert!(named, "{field} = {value}: {message}");
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
fn rope_scaling_takes_the_place_of_rope_parameters() {
    let linear = RopeScaling::Linear { factor: 4.0 };
    let (old, new) =
        (json!({ "type": "linear", "factor": 4.0 }), json!({ "rope_type": "default", "rope_theta": 77.0 }));
    let mut json = with("rope_parameters", new.clone());
    json["rope_scaling"] = old;
    let config = ModelConfig::from_value(json.clone()).unwrap();
    assert_eq!((rope(&config).theta, &rope(&config).scaling), (10_000.0, &linear));
    // and is written as one
    let written = config.with_num_key_value_heads(&[1, 1, 1], "modeling_x").json;
    assert_eq!(written["rope_parameters"], json!({ "rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0 }));
    for nothing in [Value::Null, json!({})] {
        json["rope_scaling"] = nothing;
        let config = ModelConfig::from_value(json.clone()).unwrap();
        assert_eq!((rope(&config).theta, &rope(&config).scaling), (77.0, &RopeScaling::None));
    }
}

#[test]
fn key_value_heads_that_a_file_leaves_out() {
    let heads = |model_type: &str, num_attention_heads: usize, written: Option<Value>| {
        let mut json = llama();
        (json["model_type"], json["num_attention_heads"]) = (json!(model_type), json!(num_attention_heads));
        json["head_dim"] = json!(4);
        json.as_object_mut().unwrap().remove("num_key_value_heads");
        if let Some(written) = written {
            json["num_key_value_heads"] = written;
        }
        ModelConfig::from_value(json).map(|config| config.num_key_value_heads[0]).map_err(|error| error.to_string())
    };
    for (model_type, default) in [("llama", 64), ("gemma", 16), ("mistral", 8), ("qwen2", 32), ("qwen3", 32)] {
        assert_eq!(heads(model_type, 64, None), Ok(default), "{model_type}");
        assert_eq!(heads(model_type, 64, Some(Value::Null)), Ok(64), "{model_type}");
        assert_eq!(heads(model_type, 64, Some(json!(2))), Ok(2), "{model_type}");
    }
    let message = heads("mistral", 12, None).unwrap_err();
    assert!(message.contains("is absent") && message.contains("8 of a mistral"), "{message}");
}

#[test]
fn biases_are_those_that_the_family_has() {
    let biases = |model_type: &str| {
        let mut json = with("attention_bias", json!(true));
        (json["mlp_bias"], json["model_type"]) = (json!(true), json!(model_type));
        let config = ModelConfig::from_value(json).unwrap();
        (config.qkv_bias, config.o_bias, config.mlp_bias)
    };
    assert_eq!(biases("llama"), (true, true, true));
    assert_eq!(biases("gemma"), (true, true, false));
    assert_eq!(biases("mistral"), (false, false, false));
    assert_eq!(biases("qwen2"), (true, false, false));
    assert_eq!(biases("qwen3"), (true, true, false));
}

#[test]
fn llama3_frequencies() {
    // transformers' _compute_llama3_parameters with the values of Llama-3.2-1B, head_dim 64, pairs 0, 15 and 31
    let scaling = json!({ "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192, "rope_theta": 500_000.0 });
    let mut json = with("rope_parameters", scaling);
    json["head_dim"] = json!(64);
    let inv_freq = rope(&ModelConfig::from_value(json).unwrap()).inv_freq();
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

#[test]
fn a_rewritten_phi3_rotates_as_many_values() {
    let mut json = with("model_type", json!("phi3"));
    json["rope_parameters"] = json!({
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0],
    });
    let source = ModelConfig::from_value(json).unwrap();
    let written = source.with_num_key_value_heads(&[1, 1, 1], "modeling_x").json;
    assert_eq!(written["rope_scaling"]["short_factor"], json!([1.0, 1.5]));
    assert_eq!(written["partial_rotary_factor"], json!(0.5), "which is not in rope_scaling");
    assert_eq!(ModelConfig::from_value(written).unwrap().rope, source.rope);
}

#[test]
fn a_text_beyond_the_original_context_has_other_frequencies() {
    let mut json = with("rope_scaling", json!({ "rope_type": "dynamic", "factor": 4.0 }));
    json["max_position_embeddings"] = json!(64);
    let config = ModelConfig::from_value(json).unwrap();
    assert_eq!(config.original_context(), Some(64));
    assert_eq!([0, 1, 64, 65, 100].map(|tokens| config.rope_regime(tokens).tokens()), [0, 0, 0, 65, 100]);
    assert_eq!(rope(&config).inv_freq_of(config.rope_regime(64)), rope(&config).inv_freq());
    // head_dim 8: the base times (4 * 100 / 64 - 3)^(8 / 6)
    let base = 10_000.0 * 3.25f64.powf(4.0 / 3.0);
    for (pair, found) in rope(&config).inv_freq_of(config.rope_regime(100)).into_iter().enumerate() {
        assert!((found / base.powf(-(pair as f64) / 4.0) - 1.0).abs() < 1e-12);
    }

    let [short, long] = [[1.0, 1.5, 2.0, 3.0], [2.0, 4.0, 8.0, 16.0]];
    let config = ModelConfig::from_value(with(
        "rope_scaling",
        json!({ "rope_type": "longrope", "short_factor": short, "long_factor": long, "factor": 4.0,
                "original_max_position_embeddings": 64 }),
    ))
    .unwrap();
    assert_eq!(config.original_context(), Some(64));
    assert_eq!([0, 64, 65, 100].map(|tokens| config.rope_regime(tokens).tokens()), [0, 0, 65, 65]);
    for (tokens, factors) in [(64, short), (65, long), (2048, long)] {
        let found = rope(&config).inv_freq_of(config.rope_regime(tokens));
        let expected = [0.0, 1.0, 2.0, 3.0].map(|pair: f64| 10_000f64.powf(-pair / 4.0));
        let expected: Vec<f64> = expected.iter().zip(factors).map(|(inv_freq, factor)| inv_freq / factor).collect();
        assert_eq!(found, expected, "{tokens}");
    }
}

/// Layers whose frequencies change at different lengths: one regime for all of them.
#[test]
fn the_regime_of_layers_that_differ() {
    let mut json = with("model_type", json!("gemma3_text"));
    (json["head_dim"], json["max_position_embeddings"]) = (json!(8), json!(70));
    json["layer_types"] = json!(["sliding_attention", "full_attention", "sliding_attention"]);
    json["sliding_window"] = json!(9);
    json["rope_parameters"] = json!({
        "full_attention": { "rope_type": "longrope", "short_factor": [1.0, 1.0, 1.0, 1.0], "factor": 2.0,
                            "long_factor": [2.0, 2.0, 2.0, 2.0], "original_max_position_embeddings": 48 },
        "sliding_attention": { "rope_type": "dynamic", "factor": 2.0 },
    });
    let config = ModelConfig::from_value(json).unwrap();
    assert_eq!(config.original_context(), Some(48));
    assert_eq!([48, 49, 70, 71, 90].map(|tokens| config.rope_regime(tokens).tokens()), [0, 49, 49, 71, 90]);
    let ropes: Vec<_> = config.rope.iter().flatten().collect();
    let of = |layer: usize, tokens| ropes[layer].inv_freq_of(config.rope_regime(tokens));
    assert_eq!(of(0, 70), ropes[0].inv_freq());
    assert_ne!(of(1, 70), ropes[1].inv_freq());
    assert_eq!(of(1, 70), of(1, 90));
    assert_ne!(of(0, 71), of(0, 90));
}
