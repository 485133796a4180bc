//! The kernels against candle's operations, and the cache against none.

use mqadapt_core::{DType, NoProgress};
use serde_json::json;

use super::fixtures::{Tiny, config, difference, ids, shapes};
use crate::{Device, LoadOptions, Precision};

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
