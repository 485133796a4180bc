//! A plan in memory against the converted checkpoint.

use mqadapt_compress::{LayerWeights, MergeOptions, merge_tensor, method};
use mqadapt_core::family::{LayerTensor, Module};
use mqadapt_core::{DType, LayerCache, ModelConfig, NoProgress, Plan};
use serde_json::{Value, json};

use super::fixtures::{Tiny, config, ids};
use crate::{Device, Error, LoadOptions, Model};

const FAMILIES: [&str; 6] = ["llama", "gemma", "mistral", "olmo2", "qwen2", "qwen3"];

fn logits(model: &Model) -> Vec<f32> {
    model.logits(&ids(4, 23), &NoProgress).unwrap()
}

fn values(tiny: &Tiny, name: &str) -> Vec<f32> {
    let info = tiny.checkpoint.tensor(name).unwrap();
    let mut values = vec![0.0; info.len()];
    tiny.checkpoint.read_f32(info, 0, &mut values).unwrap();
    values
}

/// What conversion writes, tensor by tensor; stored in `dtype`.
fn converted(tiny: &Tiny, plan: &Plan, name: &str, options: &MergeOptions, dtype: DType) -> Tiny {
    let source = tiny.checkpoint.config();
    let heads = plan.num_key_value_heads();
    let json: Value = source.with_num_key_value_heads(&heads, "modeling").json;
    let planned = ModelConfig::from_value(json.clone()).unwrap();
    let tensors = planned.tensors().into_iter().map(|tensor| {
        let from = values(tiny, &tensor.name);
        let len: usize = tensor.shape.iter().product();
        if from.len() == len {
            return (tensor.name, tensor.shape, from);
        }
        let place = LayerTensor::parse(&tensor.name).unwrap();
        let mut merged = vec![0.0; len];
        let rows = method(name).unwrap().rows().unwrap();
        merge_tensor(rows, options, place, &from, source.num_key_value_heads[place.layer_idx], &mut merged);
        (tensor.name, tensor.shape, merged)
    });
    Tiny::of(&json, dtype, tensors.collect())
}

#[test]
fn an_overlay_equals_the_converted_checkpoint() {
    for model_type in FAMILIES {
        for (stored, dtype) in [(DType::F32, None), (DType::BF16, None), (DType::F32, Some(DType::BF16))] {
            let tiny = Tiny::random(&config(model_type, &json!({ "attention_bias": true })), stored);
            let plan = Plan::parse("gqa2:0; mqa:2", tiny.checkpoint.config()).unwrap();
            for name in ["mean", "first", "random"] {
                let merge = MergeOptions { seed: 7, initializer_range: 0.3 };
                let options = LoadOptions {
                    plan: Some(plan.clone()),
                    method: name.to_owned(),
                    merge,
                    dtype,
                    ..LoadOptions::default()
                };
                let overlay = tiny.load(&options);
                let converted = converted(&tiny, &plan, name, &merge, dtype.unwrap_or(stored));
                let expected = logits(&converted.on(Device::Cpu));
                assert_eq!(logits(&overlay), expected, "{model_type} {stored:?} {dtype:?} {name}");
                assert_eq!(overlay.config().num_key_value_heads, [2, 6, 1]);
                assert_eq!(overlay.plan(), &plan);

                let base = tiny.load(&LoadOptions { dtype, ..LoadOptions::default() });
                let planned = base.with_plan(&tiny.checkpoint, &plan, name, &merge).unwrap();
                assert_eq!(logits(&planned), expected);
                assert_eq!(planned.fingerprint(), overlay.fingerprint());
                // and back again
                let keep = Plan::keep(tiny.checkpoint.config());
                let back = planned.with_plan(&tiny.checkpoint, &keep, name, &merge).unwrap();
                assert_eq!(logits(&back), logits(&base));
                assert_eq!(back.fingerprint(), base.fingerprint());
            }
        }
    }
}

#[test]
fn a_replaced_layer_equals_the_plan_that_made_it() {
    for model_type in FAMILIES {
        let tiny = Tiny::random(&config(model_type, &json!({ "attention_bias": true })), DType::BF16);
        let plan = Plan::parse("gqa3:1", tiny.checkpoint.config()).unwrap();
        let merged = converted(&tiny, &plan, "mean", &MergeOptions::default(), DType::BF16);
        let read = |name: &str| {
            let name = format!("model.layers.1.self_attn.{name}");
            merged.checkpoint.tensor(&name).is_some().then(|| values(&merged, &name))
        };
        let weights = LayerWeights {
            q_proj: read("q_proj.weight").unwrap(),
            k_proj: read("k_proj.weight").unwrap(),
            v_proj: read("v_proj.weight").unwrap(),
            o_proj: read("o_proj.weight").unwrap(),
            q_proj_bias: None,
            k_proj_bias: read("k_proj.bias"),
            v_proj_bias: read("v_proj.bias"),
            k_norm: read("k_norm.weight"),
        };
        let cache = LayerCache::heads(3);
        let base = tiny.on(Device::Cpu);
        let replaced = base.with_layer(1, cache, &weights).unwrap();
        assert_eq!(logits(&replaced), logits(&merged.on(Device::Cpu)), "{model_type}");
        assert_eq!(replaced.plan(), &plan);
        assert!(replaced.fingerprint() != base.fingerprint());
        // a plan takes a replaced layer back
        let keep = Plan::keep(tiny.checkpoint.config());
        let back = replaced.with_plan(&tiny.checkpoint, &keep, "mean", &MergeOptions::default()).unwrap();
        assert_eq!(logits(&back), logits(&base));

        let short = LayerWeights { k_proj: vec![0.0; 5], ..weights.clone() };
        assert!(base.with_layer(1, cache, &short).err().unwrap().to_string().contains("k_proj"));
        assert!(base.with_layer(3, cache, &weights).is_err());
        assert!(base.with_layer(1, LayerCache::heads(4), &weights).is_err());
        let whole = weights.clone();
        if weights.k_proj_bias.is_some() {
            let bare = LayerWeights { k_proj_bias: None, ..weights };
            assert!(base.with_layer(1, cache, &bare).err().unwrap().to_string().contains("k_proj.bias"));
        }
        if tiny.checkpoint.config().has_key_value_rows(Module::KNorm) {
            let bare = LayerWeights { k_norm: None, ..whole };
            assert!(base.with_layer(1, cache, &bare).err().unwrap().to_string().contains("k_norm"));
        }
    }
}

#[test]
fn the_cache_shrinks_as_the_plan_says() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::BF16);
    let bytes = |text: &str| {
        let plan = Some(Plan::parse(text, tiny.checkpoint.config()).unwrap());
        let model = tiny.load(&LoadOptions { plan, ..LoadOptions::default() });
        assert_eq!(model.kv_bytes(), 0);
        logits(&model);
        assert_eq!(model.kv_bytes(), 64 * model.kv_bytes_per_token());
        model.kv_bytes()
    };
    let all = bytes("keep");
    assert_eq!(all, 64 * 3 * 2 * 6 * 16 * 2);
    assert_eq!(bytes("mqa:all") * 6, all);
    assert_eq!(bytes("gqa3:0,2") * 3, all * 2);
}

/// A sweep: every overlay takes over what the one before has left, whatever heads it had and however long its text was.
#[test]
fn overlays_inherit_memory_and_nothing_else() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::BF16);
    let base = tiny.on(Device::Cpu);
    let overlay = |text: &str| {
        let plan = Plan::parse(text, tiny.checkpoint.config()).unwrap();
        base.with_plan(&tiny.checkpoint, &plan, "mean", &MergeOptions::default()).unwrap()
    };
    let long = |model: &Model| model.logits(&ids(9, 100), &NoProgress).unwrap();
    let fresh = |text: &str| {
        let plan = Some(Plan::parse(text, tiny.checkpoint.config()).unwrap());
        tiny.load(&LoadOptions { plan, ..LoadOptions::default() })
    };
    for text in ["mqa:1", "gqa3:0; mqa:2", "keep", "mqa:all", "mqa:1"] {
        let model = overlay(text);
        assert_eq!(model.kv_bytes(), 0);
        assert_eq!(logits(&model), logits(&fresh(text)), "{text}");
        assert_eq!(model.kv_bytes() % (64 * model.kv_bytes_per_token()), 0, "{text}");
        assert_eq!(long(&model), long(&fresh(text)), "{text}");
        assert_eq!(model.kv_bytes(), 128 * model.kv_bytes_per_token(), "{text}");
    }
    // what was left has room for the long text
    let last = overlay("mqa:0");
    logits(&last);
    assert_eq!(last.kv_bytes(), 128 * last.kv_bytes_per_token());
}

#[test]
fn fingerprints_tell_models_apart() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::F32);
    let plan = |text| Some(Plan::parse(text, tiny.checkpoint.config()).unwrap());
    let base = LoadOptions::default();
    let prints: Vec<_> = [
        base.clone(),
        LoadOptions { plan: plan("mqa:1"), ..base.clone() },
        LoadOptions { plan: plan("mqa:2"), ..base.clone() },
        LoadOptions { plan: plan("mqa:1"), method: "first".to_owned(), ..base.clone() },
        LoadOptions { plan: plan("mqa:1"), merge: MergeOptions { seed: 1, ..base.merge }, ..base.clone() },
        LoadOptions { dtype: Some(DType::BF16), ..base.clone() },
        LoadOptions { kv_dtype: Some(DType::BF16), ..base.clone() },
        LoadOptions { device: Device::CpuStock, ..base.clone() },
    ]
    .iter()
    .map(|options| tiny.load(options).fingerprint().to_owned())
    .collect();
    for (n, print) in prints.iter().enumerate() {
        assert!(print.len() == 16 && !prints[..n].contains(print), "{prints:?}");
    }
    // what computes the same has the same name
    let keep = LoadOptions { plan: plan("keep"), method: "first".to_owned(), ..base };
    assert_eq!(tiny.load(&keep).fingerprint(), prints[0]);
}

#[test]
fn wrong_plans_and_methods() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::F32);
    let other = Tiny::random(&config("llama", &json!({ "num_key_value_heads": 2 })), DType::F32);
    let load = |options: &LoadOptions| Model::load(&tiny.checkpoint, options, &NoProgress).err().unwrap();
    let plan = |tiny: &Tiny| Some(Plan::parse("mqa:1", tiny.checkpoint.config()).unwrap());
    let error = load(&LoadOptions { plan: plan(&other), ..LoadOptions::default() });
    assert!(matches!(error, Error::Argument { name: "plan", .. }), "{error}");
    let error = load(&LoadOptions { plan: plan(&tiny), method: "median".to_owned(), ..LoadOptions::default() });
    assert!(error.to_string().contains("median") && error.to_string().contains("mean"), "{error}");
    assert_eq!(tiny.json()["model_type"], "llama");
}
