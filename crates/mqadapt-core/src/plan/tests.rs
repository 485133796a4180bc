use serde_json::json;

use super::*;

fn model(heads: usize, layers: usize) -> ModelConfig {
    ModelConfig::from_value(json!({ "model_type": "llama", "hidden_size": 96, "intermediate_size": 8, "vocab_size": 10,
        "num_hidden_layers": layers, "num_attention_heads": 12, "num_key_value_heads": heads }))
    .unwrap()
}

#[test]
fn the_grammar() {
    let config = model(4, 6);
    for (text, heads) in [
        ("keep", [4, 4, 4, 4, 4, 4]),
        ("1, 0, 0,1,0 , 1", [1, 4, 4, 1, 4, 1]),
        ("mqa:all", [1; 6]),
        ("mqa:first2", [1, 1, 4, 4, 4, 4]),
        ("gqa2:last3", [4, 4, 4, 2, 2, 2]),
        ("mqa:alternate3", [4, 1, 4, 1, 4, 1]),
        ("mqa:alternate1", [4, 4, 4, 4, 4, 1]),
        (" gqa2 : all ; mqa : 0, 3-4 ", [1, 2, 2, 1, 1, 2]),
        ("mqa:all;gqa4:5", [1, 1, 1, 1, 1, 4]),
    ] {
        assert_eq!(Plan::parse(text, &config).unwrap().num_key_value_heads(), heads, "{text}");
    }
    for text in [
        "",
        "mqa",
        "mqa:",
        "mqa:last0",
        "mqa:last7",
        "mqa:alternate4",
        "mqa:4-2",
        "mqa:x",
        "mqa:1-",
        "gqa:all",
        "gqa0:all",
        "gqa-1:all",
        "MQA:all",
        "mqa:all;",
        "1,0",
        "1,0,2,0,0,0",
        "0,0,0,0,0,0,0",
        "mqa:6",
        "gqa3:all",
        "gqa8:0",
        "mqa:99999999999999999999",
    ] {
        assert!(Plan::parse(text, &config).is_err(), "{text}");
    }
}

#[test]
fn an_illegal_count_lists_the_legal() {
    let message = Plan::parse("gqa5:2", &model(6, 3)).unwrap_err().to_string();
    assert_eq!(message, "layer 2 cannot have 5 K/V heads: it has 6, so 1, 2, 3 and 6 are possible");
}

#[test]
fn documents() {
    let config = model(4, 3);
    for text in [
        "{\"num_key_value_heads\": [4, 2, 1]}",
        "num_key_value_heads: [4, 2, 1]",
        "num_key_value_heads:\n- 4\n- 2\n- 1\n",
    ] {
        assert_eq!(Plan::from_document(text, &config).unwrap().num_key_value_heads(), [4, 2, 1], "{text}");
    }
    for text in [
        "",
        "{",
        "[4, 2, 1]",
        "{}",
        "{\"num_key_value_heads\": 1}",
        "{\"num_key_value_heads\": [4, 2, -1]}",
        "{\"num_key_value_heads\": [4, 2]}",
        "{\"num_key_value_heads\": [4, 2, 3]}",
        "{\"heads\": [4, 2, 1]}",
    ] {
        assert!(Plan::from_document(text, &config).is_err(), "{text}");
    }
    let plan = Plan::parse("mqa:1", &config).unwrap();
    assert_eq!(Plan::from_document(&plan.to_string(), &config).unwrap(), plan);
    assert_eq!(plan.changed_layers(), [1]);
}

#[test]
fn a_plan_is_described_in_the_grammar() {
    let config = model(4, 7);
    for (text, expected) in [
        ("keep", "keep"),
        ("gqa4:all", "keep"),
        ("gqa2:4; mqa:1-3,6", "mqa:1-3,6; gqa2:4"),
        ("mqa:alternate3", "mqa:2,4,6"),
        ("gqa2:all", "gqa2:0-6"),
    ] {
        let plan = Plan::parse(text, &config).unwrap();
        assert_eq!(plan.describe(), expected);
        assert_eq!(Plan::parse(expected, &config).unwrap(), plan);
    }
}

#[test]
fn reductions_ascend_and_are_legal() {
    let config = model(12, 1);
    let source = Plan::keep(&config);
    let reductions = source.layers()[0].reductions();
    assert_eq!(reductions.iter().map(|cache| cache.num_key_value_heads()).collect::<Vec<_>>(), [1, 2, 3, 4, 6, 12]);
    assert!(reductions.is_sorted_by_key(|cache| cache.bytes_per_token(8, 2)));
    for cache in reductions {
        assert_eq!(Plan::from_layers(&[cache], source.layers()).unwrap().layers(), [cache]);
    }
    assert!(matches!(
        Plan::from_layers(&[LayerCache::heads(5)], source.layers()),
        Err(Error::PlanHeads { found: 5, .. })
    ));
}
