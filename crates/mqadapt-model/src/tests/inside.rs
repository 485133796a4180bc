//! Residual streams, what layers see, divergences.

use mqadapt_compress::MergeOptions;
use mqadapt_core::{DType, NoProgress, Plan};
use serde_json::json;

use super::fixtures::{Tiny, config, difference, ids};
use super::variants::shapes;
use crate::{Device, Error, HiddenStates, Model};

fn sequences() -> Vec<Vec<u32>> {
    vec![ids(1, 13), ids(2, 1), vec![], ids(3, 40), ids(4, 7), ids(5, 20)]
}

/// Bit for bit, however they are packed: what passes a layer in company is what passes it alone.
#[test]
fn hidden_states_stop_and_go_on() {
    for json in shapes() {
        let tiny = Tiny::random(&json, DType::F32);
        let model = tiny.in_flight(32);
        let sequences = sequences();
        let all = model.hidden_before(3, &sequences, &NoProgress).unwrap();
        assert_eq!((all.layer_idx, &all.lengths[..]), (3, &[13, 1, 0, 40, 7, 20][..]));
        for layer_idx in 0..=3 {
            let before = model.hidden_before(layer_idx, &sequences, &NoProgress).unwrap();
            assert_eq!(model.forward_from(&before, 3, &NoProgress).unwrap(), all, "{json} {layer_idx}");
            let alone = model.hidden_states(&sequences[3], &NoProgress).unwrap();
            if layer_idx < 3 {
                assert_eq!(before.values[14 * 48..54 * 48], alone[layer_idx]);
            }
        }
    }
}

#[test]
fn layers_are_traced() {
    for (json, device) in shapes().into_iter().flat_map(|json| [(json.clone(), Device::Cpu), (json, Device::CpuStock)])
    {
        let tiny = Tiny::random(&json, DType::F32);
        let model = tiny.on(device);
        let sequences = sequences();
        let expected: Vec<_> =
            (0..=3).map(|layer_idx| model.hidden_before(layer_idx, &sequences, &NoProgress).unwrap()).collect();
        let mut seen = Vec::new();
        let mut visitor = |trace: &crate::LayerTrace<'_>| -> Result<(), Error> {
            let length = sequences[trace.sequence].len();
            let first: usize = sequences[..trace.sequence].iter().map(Vec::len).sum();
            let stream = &expected[trace.layer_idx].values[first * 48..(first + length) * 48];
            assert!(difference(trace.hidden, stream) < 1e-5, "{json} {device:?}");
            let config = tiny.checkpoint.config();
            let wide = config.head_dim;
            let kv = config.num_key_value_heads[trace.layer_idx] * wide;
            assert_eq!(trace.attention_input.len(), length * 48);
            assert_eq!([trace.q.len(), trace.attention.len()], [length * 6 * wide; 2]);
            assert_eq!([trace.k.len(), trace.v.len()], [length * kv; 2]);
            // the first token attends itself alone: its attention is its value, once for each head of the group
            let groups = 6 * wide / kv;
            for head in 0..6 {
                let value = &trace.v[head / groups * wide..][..wide];
                assert!(difference(&trace.attention[head * wide..][..wide], value) < 1e-5);
            }
            seen.push((trace.layer_idx, trace.sequence));
            Ok(())
        };
        let last = model.trace_layers(&sequences, &mut visitor, &NoProgress).unwrap();
        assert!(difference(&last.values, &expected[3].values) < 1e-5);
        let order: Vec<_> = (0..3).flat_map(|layer| [0, 1, 3, 4, 5].map(|sequence| (layer, sequence))).collect();
        assert_eq!(seen, order);
    }
}

#[test]
fn nll_is_that_of_the_scores() {
    let tiny = Tiny::random(&config("gemma", &json!({ "num_key_value_heads": 2 })), DType::BF16);
    let model = tiny.in_flight(16);
    let hidden = model.hidden_before(3, &sequences(), &NoProgress).unwrap();
    let nll = model.nll(&hidden, &sequences(), &NoProgress).unwrap();
    assert_eq!(nll.len(), 12 + 39 + 6 + 19);
    let requests = [(ids(3, 40)[..1].to_vec(), ids(3, 40)[1..].to_vec())];
    let score = model.loglikelihood(&requests, &NoProgress).unwrap()[0].0;
    assert!((nll[12..12 + 39].iter().sum::<f64>() + score).abs() < 1e-9);
    assert!(model.nll(&hidden, &[ids(1, 3)], &NoProgress).is_err());
}

/// f32 logits, f64 sums: 1e-6 a row.
#[test]
fn divergence_of_two_models() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::F32);
    let plan = Plan::parse("mqa:1,2", tiny.checkpoint.config()).unwrap();
    for device in [Device::Cpu, Device::CpuStock] {
        let base = tiny.on(device);
        let other = base.with_plan(&tiny.checkpoint, &plan, "mean", &MergeOptions::default()).unwrap();
        let hidden = |model: &Model| model.hidden_before(3, &sequences(), &NoProgress).unwrap();
        let (p, q) = (hidden(&base), hidden(&other));
        assert!(base.kl_divergence(&p, &p, &NoProgress).unwrap().iter().all(|kl| kl.abs() < 1e-9));
        let found = base.kl_divergence(&p, &q, &NoProgress).unwrap();
        let logits = |model: &Model| -> Vec<f32> {
            sequences().iter().flat_map(|sequence| model.logits(sequence, &NoProgress).unwrap()).collect()
        };
        let softmax = |row: &[f32]| -> Vec<f64> {
            let total: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
            row.iter().map(|x| f64::from(*x).exp() / total).collect()
        };
        for ((p, q), found) in logits(&base).chunks(97).zip(logits(&other).chunks(97)).zip(&found) {
            let (p, q) = (softmax(p), softmax(q));
            let exact: f64 = p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum();
            assert!((found - exact).abs() < 1e-5 && exact > 1e-4, "{found} {exact}");
        }
        let wrong = HiddenStates { layer_idx: 2, ..q };
        assert!(base.kl_divergence(&p, &wrong, &NoProgress).is_err());
    }
}

#[test]
fn wrong_states_are_refused() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::F32);
    let model = tiny.on(Device::Cpu);
    let hidden = model.hidden_before(2, &sequences(), &NoProgress).unwrap();
    assert!(model.forward_from(&hidden, 1, &NoProgress).is_err());
    assert!(model.forward_from(&hidden, 4, &NoProgress).is_err());
    assert!(model.hidden_before(4, &sequences(), &NoProgress).is_err());
    let short = HiddenStates { values: vec![0.0; 3], ..hidden };
    assert!(model.forward_from(&short, 3, &NoProgress).is_err());
    assert!(model.logits(&[], &NoProgress).unwrap().is_empty());
}
