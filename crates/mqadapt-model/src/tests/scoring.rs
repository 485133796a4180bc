//! Log-likelihoods against logits, however requests are packed.

use std::sync::atomic::{AtomicUsize, Ordering};

use mqadapt_core::{DType, Interrupted, NoProgress, Progress};
use serde_json::json;

use super::fixtures::{Tiny, config, ids};
use crate::{Device, Error, Model};

/// Requests that share prefixes of all kinds: contexts, parts of continuations, everything; in no order.
fn requests() -> Vec<(Vec<u32>, Vec<u32>)> {
    let (shots, question) = (ids(1, 60), ids(2, 9));
    let context = [shots.clone(), question].concat();
    let mut requests = vec![
        (context.clone(), ids(3, 7)),
        (vec![5], vec![6]),
        (context.clone(), [&ids(3, 7)[..4], &[90, 91]].concat()),
        (shots[..30].to_vec(), shots[30..60].to_vec()),
        (context.clone(), vec![1]),
        (context.clone(), vec![2]),
        (context.clone(), vec![]),
        (context[..69].to_vec(), ids(4, 40)),
        (vec![5], vec![6]),
    ];
    for seed in 0..6 {
        requests.push((ids(100 + seed, 3), ids(200 + seed, 1 + 11 * seed as usize)));
    }
    requests
}

/// Straight from the logits, in f64.
fn expected(model: &Model, request: &(Vec<u32>, Vec<u32>)) -> (f64, bool) {
    let all = [request.0.clone(), request.1.clone()].concat();
    let logits = model.logits(&all, &NoProgress).unwrap();
    let (mut sum, mut greedy) = (0.0, true);
    for position in request.0.len()..all.len() {
        let row = &logits[(position - 1) * 97..position * 97];
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let total: f64 = row.iter().map(|x| f64::from(x - top).exp()).sum();
        sum += f64::from(row[all[position] as usize] - top) - total.ln();
        greedy &= row.iter().position(|x| *x == top) == Some(all[position] as usize);
    }
    (sum, greedy)
}

/// f32: the two sum the same exponentials in another order, 1e-6 a token; 40 tokens at most.
#[test]
fn scores_are_those_of_the_logits() {
    for (model_type, window) in [("llama", None), ("gemma", None), ("mistral", Some(11))] {
        let json = config(model_type, &json!({ "num_key_value_heads": 2, "sliding_window": window }));
        let tiny = Tiny::random(&json, DType::F32);
        for device in [Device::Cpu, Device::CpuStock] {
            let model = tiny.on(device);
            let mut requests = requests();
            // one that greedy decoding gives
            let context = ids(50, 12);
            let mut greedy = vec![];
            for _ in 0..5 {
                let all = [context.clone(), greedy.clone()].concat();
                let logits = model.logits(&all, &NoProgress).unwrap();
                let row = &logits[logits.len() - 97..];
                greedy.push((0..97).max_by(|&a, &b| row[a as usize].total_cmp(&row[b as usize])).unwrap());
            }
            requests.push((context, greedy));
            let scores = model.loglikelihood(&requests, &NoProgress).unwrap();
            for (request, (sum, greedy)) in requests.iter().zip(&scores) {
                let (expected_sum, expected_greedy) = expected(&model, request);
                assert!((sum - expected_sum).abs() < 1e-4, "{device:?} {request:?} {sum} {expected_sum}");
                assert_eq!(*greedy, expected_greedy, "{device:?} {request:?}");
            }
            assert!(scores.last().unwrap().1);
        }
    }
}

/// Bit for bit, on the kernels: neither the size of passes nor the company of other requests changes a score.
#[test]
fn packing_changes_nothing() {
    for dtype in [DType::F32, DType::BF16] {
        let tiny = Tiny::random(&config("llama", &json!({ "num_key_value_heads": 3 })), dtype);
        let requests = requests();
        let all = tiny.in_flight(1024).loglikelihood(&requests, &NoProgress).unwrap();
        for most in [1, 2, 7, 33, 64, 100] {
            assert_eq!(tiny.in_flight(most).loglikelihood(&requests, &NoProgress).unwrap(), all, "{dtype:?} {most}");
        }
        let model = tiny.in_flight(1024);
        for (request, score) in requests.iter().zip(&all) {
            assert_eq!(model.loglikelihood(std::slice::from_ref(request), &NoProgress).unwrap(), [*score]);
        }
    }
}

#[test]
fn the_cache_is_bounded_by_the_longest_request_and_a_pass() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::F32);
    let model = tiny.in_flight(32);
    model.loglikelihood(&requests(), &NoProgress).unwrap();
    let longest = 69 + 40 - 1;
    assert_eq!(model.kv_bytes(), (longest + 32usize).next_multiple_of(64) as u64 * model.kv_bytes_per_token());
}

#[test]
fn perplexity_is_the_mean_over_windows() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::F32);
    let (model, text) = (tiny.on(Device::Cpu), ids(8, 107));
    let found = model.perplexity(&text, 25, None, &NoProgress).unwrap();
    let windows: Vec<f64> = text
        .chunks_exact(25)
        .map(|window| -expected(&model, &(window[..1].to_vec(), window[1..].to_vec())).0 / 24.0)
        .collect();
    assert_eq!((found.tokens, found.window_nll.len()), (4 * 24, 4));
    let mean = windows.iter().sum::<f64>() / 4.0;
    assert!((found.perplexity.ln() - mean).abs() < 1e-6);
    assert_eq!(model.perplexity(&text, 25, Some(2), &NoProgress).unwrap().window_nll, found.window_nll[..2]);
    for (context, length) in [(1, 107), (25, 24), (108, 107)] {
        let error = model.perplexity(&text[..length], context, None, &NoProgress).unwrap_err();
        assert!(matches!(error, Error::Argument { .. }), "{error}");
    }
}

#[test]
fn wrong_requests_are_named() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::F32);
    let model = tiny.on(Device::Cpu);
    let message = |request| model.loglikelihood(&[(vec![1], vec![2]), request], &NoProgress).unwrap_err().to_string();
    assert!(message((vec![], vec![1])).contains("request 1"), "{}", message((vec![], vec![1])));
    assert!(message((vec![1, 97], vec![1])).contains("token id 97"));
    assert!(message((vec![1], vec![u32::MAX])).contains("token id 4294967295"));
}

/// Interrupts after some calls.
struct Impatient(AtomicUsize);

impl Progress for Impatient {
    fn advance(&self, _phase: &str, _done: u64, _total: u64) -> Result<(), Interrupted> {
        if self.0.fetch_sub(1, Ordering::Relaxed) <= 1 { Err(Interrupted) } else { Ok(()) }
    }
}

#[test]
fn an_interrupted_model_goes_on_working() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::F32);
    let model = tiny.in_flight(16);
    let all = model.loglikelihood(&requests(), &NoProgress).unwrap();
    for patience in [1, 2, 5, 40] {
        let error = model.loglikelihood(&requests(), &Impatient(AtomicUsize::new(patience))).unwrap_err();
        assert!(matches!(error, Error::Interrupted(_)));
        assert_eq!(model.loglikelihood(&requests(), &NoProgress).unwrap(), all);
    }
    let error = Model::load(&tiny.checkpoint, &crate::LoadOptions::default(), &Impatient(AtomicUsize::new(1)));
    assert!(matches!(error.err(), Some(Error::Interrupted(_))));
}
