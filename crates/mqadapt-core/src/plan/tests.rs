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
        "[4, 2, 1]",
        "- 4\n- 2\n- 1\n",
        "{\"num_key_value_heads\": [4, 2, 1], \"method\": \"mean\", \"options\": {\"seed\": 3}}",
        "{\"format_version\": 1, \"source\": {}, \"plan\": {\"num_key_value_heads\": [4, 2, 1]}, \"method\": \"mean\"}",
    ] {
        assert_eq!(Plan::from_document(text, &config).unwrap().num_key_value_heads(), [4, 2, 1], "{text}");
    }
    for text in [
        "",
        "{",
        "[4, 2, [1]]",
        "[4, 2",
        "[]",
        "{\"format_version\": 1, \"num_key_value_heads\": [4, 2, 1]}",
        "{\"num_key_value_heads\": [4, 2, 1], \"method\": 1}",
        "{\"num_key_value_heads\": [4, 2, 1], \"options\": []}",
        "{\"num_key_value_heads\": [4, 2, 1], \"options\": {\"seeds\": 1}}",
        "{\"num_key_value_heads\": [4, 2, 1], \"options\": {\"calibration_tokens\": -1}}",
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
fn a_document_says_how_heads_are_merged() {
    let text =
        "{\"format_version\": 1, \"plan\": {\"num_key_value_heads\": [4, 1]}, \"method\": \"closed-form\", \"options\":
        {\"seed\": 7, \"initializer_range\": 0.02, \"calibration_fingerprint\": \"f\", \"calibration_tokens\": 99,
         \"calibration_context\": [5, 9], \"sequential\": true, \"regroup\": true}}";
    let merge = PlanDocument::parse(text).unwrap().merge;
    let fields = serde_json::json!({
        "method": "closed-form", "seed": 7, "calibration_tokens": 99, "calibration_context": [5, 9], "sequential": true,
        "regroup": true,
    });
    assert_eq!(serde_json::Value::Object(merge.fields()), fields);
    assert_eq!(PlanDocument::parse("[4, 1]").unwrap().merge, MergeSettings::default());
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

#[test]
fn storage_stands_behind_any_form() {
    let config = model(4, 6);
    for (text, expected, file) in [
        ("keep@int4:all", "keep@int4:0-5", true),
        ("mqa@int8:last2; keep@int4:0", "mqa@int8:4-5; keep@int4:0", true),
        ("gqa2@int4:all; gqa2:3; mqa @ int4 :0", "mqa@int4:0; gqa2@int4:1-2,4-5; gqa2:3", true),
        ("mqa:0; keep:all", "keep", false),
        ("gqa4@int8:1", "keep@int8:1", true),
    ] {
        let plan = Plan::parse(text, &config).unwrap();
        assert_eq!(plan.describe(), expected, "{text}");
        assert_eq!(Plan::parse(expected, &config).unwrap(), plan);
        assert_eq!(Plan::from_document(&plan.to_string(), &config).unwrap(), plan);
        assert_eq!(plan.to_string().contains("storage"), file);
    }
    for text in
        ["keep@int4", "mqa@:all", "mqa@int5:all", "mqa@computed:all", "@int4:all", "mqa@2.5:all", "keep@int4@int4:all"]
    {
        assert!(Plan::parse(text, &config).is_err(), "{text}");
    }
    let stored = "{\"num_key_value_heads\": [4, 4, 4, 4, 4, 1], \"storage\": ";
    for list in ["[]", "\"int4\"", "[1, 2, 3, 4, 5, 6]", "[\"int4\", \"int4\", \"int4\", \"int4\", \"int4\", \"x\"]"] {
        assert!(Plan::from_document(&format!("{stored}{list}}}"), &config).is_err(), "{list}");
    }
}

#[test]
fn storage_changes_bytes_and_no_weights() {
    let config = model(4, 6); // head_dim 8
    let plan = Plan::parse("keep@int4:0-1; keep@int8:2; mqa@int4:3", &config).unwrap();
    let bytes: Vec<_> = plan.layers().iter().map(|cache| cache.bytes_per_token(8, 2)).collect();
    assert_eq!(bytes, [2 * 4 * 6, 2 * 4 * 6, 2 * 4 * 10, 2 * 6, 2 * 4 * 16, 2 * 4 * 16]);
    assert_eq!(LayerCache::heads(2).stored(CacheStorage::Int4).bytes_per_token(7, 2), 2 * 2 * 6);
    assert_eq!((plan.changed_layers(), plan.stored_layer()), (vec![3], Some((0, CacheStorage::Int4))));
    assert_eq!(plan.unmerged().describe(), "keep@int4:0-1,3; keep@int8:2");
}

#[test]
fn one_storage_for_all_layers() {
    let config = model(4, 3);
    let stored = |text: &str, storage| Plan::parse(text, &config).unwrap().stored(storage);
    assert_eq!(stored("mqa:1", CacheStorage::Int8).unwrap().describe(), "mqa@int8:1; keep@int8:0,2");
    assert_eq!(stored("keep@int8:2", CacheStorage::Int8).unwrap().describe(), "keep@int8:0-2");
    let error = stored("keep@int8:2", CacheStorage::Int4).unwrap_err().to_string();
    assert!(error.contains("layer 2") && error.contains("int8") && error.contains("int4"), "{error}");
}
