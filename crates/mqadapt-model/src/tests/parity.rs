//! The kernels against candle's operations, and the cache against none.

use mqadapt_core::{DType, NoProgress, Plan};
use serde_json::json;

use super::fixtures::{Tiny, config, difference, ids};
use super::variants::shapes;
use crate::{Device, LoadOptions, Precision, WeightFormat};

/// f32: both sum the same products in another order; 2e-5 is some fifty roundings of the largest value after three layers.
#[test]
fn kernels_equal_stock_operations() {
    for json in shapes() {
        let tiny = Tiny::random(&json, DType::F32);
        let (kernels, stock) = (tiny.on(Device::Cpu), tiny.on(Device::CpuStock));
        for length in [1, 2, 17, 128] {
            let ids = ids(length as u64, length);
            let ours = kernels.hidden_states(&ids, &NoProgress).unwrap();
            let theirs = stock.hidden_states(&ids, &NoProgress).unwrap();
            for (layer, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                assert!(difference(ours, theirs) < 2e-5, "{json} length {length} layer {layer}");
            }
            let logits = |model: &crate::Model| model.logits(&ids, &NoProgress).unwrap();
            assert!(difference(&logits(&kernels), &logits(&stock)) < 2e-5, "{json} length {length}");
        }
    }
}

/// Half-width weights are widened exactly, so in exact mode only the order of sums differs (the cache is f32 on both);
/// in fast mode activations are rounded to 8 bits before every product: 2 % of the largest logit after three layers.
#[test]
fn half_width_weights() {
    for dtype in [DType::BF16, DType::F16] {
        let tiny = Tiny::random(&config("llama", &json!({ "num_key_value_heads": 2 })), dtype);
        let logits = |precision, device| {
            let options = LoadOptions { precision, device, kv_dtype: Some(DType::F32), ..LoadOptions::default() };
            tiny.load(&options).logits(&ids(3, 40), &NoProgress).unwrap()
        };
        let stock = logits(Precision::Exact, Device::CpuStock);
        assert!(difference(&logits(Precision::Exact, Device::Cpu), &stock) < 2e-5, "{dtype:?}");
        assert!(difference(&logits(Precision::Fast, Device::Cpu), &stock) < 2e-2, "{dtype:?}");
    }
}

/// The kernels add in an order that does not depend on how a sequence is cut: bit for bit. candle's products do depend on
/// it: 1e-5.
#[test]
fn the_cache_changes_nothing() {
    for json in shapes() {
        let ids = ids(9, 37);
        for dtype in [DType::F32, DType::BF16] {
            let tiny = Tiny::random(&json, dtype);
            for device in [Device::Cpu, Device::CpuStock] {
                let model = tiny.on(device);
                let whole = model.logits(&ids, &NoProgress).unwrap();
                for steps in [vec![20], vec![1; 37], vec![5, 1, 1, 13, 3]] {
                    let cut = model.logits_in_steps(&ids, &steps, &NoProgress).unwrap();
                    match device {
                        Device::Cpu => assert_eq!(cut, whole, "{json} {dtype:?} {steps:?}"),
                        _ => assert!(difference(&cut, &whole) < 1e-5, "{json} {dtype:?} {steps:?}"),
                    }
                }
            }
        }
    }
}

/// A cache of half-width values: each is rounded once, to 8 bits of mantissa (bf16) or 11 (f16).
#[test]
fn cache_dtypes() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::F32);
    let logits = |kv_dtype, device| {
        let options = LoadOptions { kv_dtype: Some(kv_dtype), device, ..LoadOptions::default() };
        let model = tiny.load(&options);
        let logits = model.logits(&ids(3, 40), &NoProgress).unwrap();
        assert_eq!(model.kv_bytes(), 64 * model.kv_bytes_per_token());
        logits
    };
    let exact = logits(DType::F32, Device::Cpu);
    for (dtype, tolerance) in [(DType::BF16, 2e-2), (DType::F16, 2e-3)] {
        for device in [Device::Cpu, Device::CpuStock] {
            let found = difference(&logits(dtype, device), &exact);
            assert!(found > 0.0 && found < tolerance, "{dtype:?} {device:?} {found}");
        }
    }
}

/// The model of the rounded weights, which are computed here as floats: the same products in another order, 2e-5 as above.
/// And what holds for floats holds here: the cache and packing change nothing.
#[test]
fn int8_weights() {
    for json in shapes() {
        let tiny = Tiny::random(&json, DType::F32);
        let rounded = tiny.checkpoint.tensors().iter().map(|info| {
            let mut values = vec![0.0; info.len()];
            tiny.checkpoint.read_f32(info, 0, &mut values).unwrap();
            if let &[_, columns] = info.shape.as_slice() {
                for row in values.chunks_mut(columns) {
                    let largest = row.iter().fold(0f32, |most, x| most.max(x.abs()));
                    for x in row {
                        *x = (*x * (127.0 / largest)).round() * (largest / 127.0);
                    }
                }
            }
            (info.name.clone(), info.shape.clone(), values)
        });
        let rounded = Tiny::of(&json, DType::F32, rounded.collect());
        let logits = |tiny: &Tiny, weights, precision| {
            let model = tiny.load(&LoadOptions { weights, precision, ..LoadOptions::default() });
            let logits = model.logits(&ids(3, 40), &NoProgress).unwrap();
            assert_eq!(model.logits_in_steps(&ids(3, 40), &[7, 1, 1, 20], &NoProgress).unwrap(), logits);
            (logits, model.bytes_per_step(0), model.fingerprint().to_owned())
        };
        let int8 = logits(&tiny, WeightFormat::Int8, Precision::Exact);
        let stored = logits(&tiny, WeightFormat::Stored, Precision::Exact);
        let expected = logits(&rounded, WeightFormat::Stored, Precision::Exact);
        assert!(difference(&int8.0, &expected.0) < 2e-5, "{json}");
        // activations of 8 bits: a step is 6 / 127 of their root mean square at most
        let fast = difference(&logits(&tiny, WeightFormat::Int8, Precision::Fast).0, &expected.0);
        assert!(fast > 1e-4 && fast < 5e-2, "{json} {fast}");
        assert!(difference(&int8.0, &stored.0) > 1e-3, "{json}");
        assert!(int8.1 * 3 < stored.1 && int8.2 != stored.2);
    }
    let tiny = Tiny::random(&config("llama", &json!({})), DType::F32);
    let options = LoadOptions { weights: WeightFormat::Int8, device: Device::CpuStock, ..LoadOptions::default() };
    let error = crate::Model::load(&tiny.checkpoint, &options, &NoProgress).err().unwrap();
    assert!(error.to_string().contains("int8"), "{error}");
}

/// Caches of integers: near the exact one, the same bits however a text is cut, and as many bytes as the plan counts.
#[test]
fn stored_caches() {
    for json in shapes() {
        let tiny = Tiny::random(&json, DType::F32);
        let source = tiny.checkpoint.config();
        let text = ids(3, 150);
        let exact = tiny.load(&LoadOptions::default()).logits(&text, &NoProgress).unwrap();
        for (name, tolerance) in [("keep@int8:all", 6e-2), ("keep@int4:all", 0.6), ("keep@int4:0; keep@int8:1", 0.6)] {
            let plan = Some(Plan::parse(name, source).unwrap());
            let model = tiny.load(&LoadOptions { plan: plan.clone(), ..LoadOptions::default() });
            let whole = model.logits(&text, &NoProgress).unwrap();
            let found = difference(&whole, &exact);
            assert!(found > 0.0 && found < tolerance, "{json} {name} {found}");
            for steps in [vec![1; 20], vec![7, 100, 1, 30]] {
                assert_eq!(model.logits_in_steps(&text, &steps, &NoProgress).unwrap(), whole, "{json} {name}");
            }
            assert_eq!(model.kv_bytes(), 192 * model.kv_bytes_per_token(), "{json} {name}");
            let options = LoadOptions { plan, device: Device::CpuStock, ..LoadOptions::default() };
            let error = crate::Model::load(&tiny.checkpoint, &options, &NoProgress).err().unwrap().to_string();
            assert!(error.contains("needs device 'cpu'"), "{error}");
        }
    }
}
