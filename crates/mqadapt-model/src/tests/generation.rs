//! Generation against the logits, however many prompts run at once.

use mqadapt_core::{DType, NoProgress};
use serde_json::json;

use super::fixtures::{Tiny, config, ids};
use crate::{Device, Error, GenerateOptions, Model};

fn prompts() -> Vec<Vec<u32>> {
    let shots = ids(1, 50);
    let mut prompts: Vec<Vec<u32>> = (0..9).map(|n| [&shots[..50 - 4 * n], &ids(60 + n as u64, n)].concat()).collect();
    prompts.push(vec![3]);
    prompts.push(shots);
    prompts.push(prompts[2].clone());
    prompts
}

/// One token after the other, straight from the logits.
fn greedy(model: &Model, prompt: &[u32], count: usize) -> Vec<u32> {
    let mut all = prompt.to_vec();
    for _ in 0..count {
        let logits = model.logits(&all, &NoProgress).unwrap();
        let row = &logits[logits.len() - 97..];
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        all.push(row.iter().position(|x| *x == top).unwrap() as u32);
    }
    all.split_off(prompt.len())
}

fn generate(model: &Model, prompts: &[Vec<u32>], options: &GenerateOptions) -> Vec<Vec<u32>> {
    model.generate(prompts, options, &mut |_, _| true, &NoProgress).unwrap()
}

#[test]
fn greedy_text_is_that_of_the_logits() {
    for (model_type, window) in [("llama", None), ("gemma", None), ("mistral", Some(11))] {
        let json = config(model_type, &json!({ "num_key_value_heads": 2, "sliding_window": window }));
        for dtype in [DType::F32, DType::BF16] {
            let tiny = Tiny::random(&json, dtype);
            let model = tiny.on(Device::Cpu);
            let options = GenerateOptions { max_new_tokens: 12, ..GenerateOptions::default() };
            let expected: Vec<_> = prompts().iter().map(|prompt| greedy(&model, prompt, 12)).collect();
            for most in [1, 3, 40, 1024] {
                assert_eq!(generate(&tiny.in_flight(most), &prompts(), &options), expected, "{model_type} {most}");
            }
        }
    }
}

#[test]
fn stock_operations_generate_the_same() {
    let tiny = Tiny::random(&config("qwen3", &json!({ "num_key_value_heads": 2 })), DType::F32);
    let options = GenerateOptions { max_new_tokens: 8, ..GenerateOptions::default() };
    let texts = [Device::Cpu, Device::CpuStock].map(|device| generate(&tiny.on(device), &prompts()[..3], &options));
    assert_eq!(texts[0], texts[1]);
}

/// Many prompts, long outputs, little room: sequences wait, share, end and make room in every order.
#[test]
fn sequences_that_share_do_not_disturb_each_other() {
    let tiny = Tiny::random(&config("llama", &json!({ "num_key_value_heads": 1 })), DType::F32);
    let shots = ids(1, 70);
    let prompts: Vec<Vec<u32>> =
        (0..40).map(|n| [&shots[..(n * 13) % 70], &ids(500 + n as u64, 1 + n % 5)].concat()).collect();
    let alone = tiny.on(Device::Cpu);
    // greedy text of random weights runs into loops; drawn text differs everywhere
    let options = GenerateOptions { max_new_tokens: 150, temperature: 1.0, seed: 3, ..GenerateOptions::default() };
    let ends = |index: usize, count: usize| count == 1 + (index * 29) % 150;
    let run = |model: &Model, prompts: &[Vec<u32>]| {
        let mut counts = vec![0; prompts.len()];
        let mut on_token = |index: usize, _| {
            counts[index] += 1;
            !ends(index, counts[index])
        };
        model.generate(prompts, &options, &mut on_token, &NoProgress).unwrap()
    };
    let together = run(&tiny.in_flight(48), &prompts);
    assert_eq!(together, run(&alone, &prompts));
    for (index, text) in together.iter().enumerate() {
        assert!(ends(index, text.len()));
        // on its own, at its place in the list so that its draws are the same
        if index % 8 == 0 {
            let mut padded = vec![vec![1u32]; index];
            padded.push(prompts[index].clone());
            let own = GenerateOptions { max_new_tokens: text.len(), ..options.clone() };
            assert_eq!(generate(&alone, &padded, &own)[index], *text);
        }
    }
}

#[test]
fn sequences_end_where_they_are_told() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::F32);
    let model = tiny.on(Device::Cpu);
    let options = GenerateOptions { max_new_tokens: 12, ..GenerateOptions::default() };
    let whole = generate(&model, &prompts(), &options);
    let stop = whole[1][5];
    let first = whole.iter().map(|text| text.iter().position(|&token| token == stop).unwrap_or(12));
    let expected: Vec<_> = whole.iter().zip(first).map(|(text, end)| text[..end].to_vec()).collect();
    let stopping = GenerateOptions { stop_tokens: vec![stop], ..options.clone() };
    assert_eq!(generate(&model, &prompts(), &stopping), expected);
    assert!(expected[1].len() < 12);

    let mut told = vec![Vec::new(); prompts().len()];
    let mut on_token = |index: usize, token| {
        told[index].push(token);
        told[index].len() < 1 + index
    };
    let texts = model.generate(&prompts(), &options, &mut on_token, &NoProgress).unwrap();
    for (index, text) in texts.iter().enumerate() {
        assert_eq!(text[..], whole[index][..(1 + index).min(12)]);
    }
    assert_eq!(texts, told);
    let none = GenerateOptions { max_new_tokens: 0, ..options };
    assert!(generate(&model, &prompts(), &none).iter().all(Vec::is_empty));
    assert!(generate(&model, &[], &none).is_empty());
}

#[test]
fn wrong_options_are_named() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::F32);
    let model = tiny.on(Device::Cpu);
    let fails = |prompts: &[Vec<u32>], options: &GenerateOptions, word: &str| {
        let error = model.generate(prompts, options, &mut |_, _| true, &NoProgress).unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
        error
    };
    let options = GenerateOptions::default();
    fails(&[vec![1], vec![]], &options, "prompt 1");
    assert!(matches!(fails(&[vec![1], vec![97]], &options, "token id 97"), Error::Token { sequence: 1, .. }));
    fails(&[vec![1]], &GenerateOptions { temperature: -1.0, ..options.clone() }, "temperature");
    fails(&[vec![1]], &GenerateOptions { temperature: f64::NAN, ..options.clone() }, "temperature");
    fails(&[vec![1]], &GenerateOptions { top_k: Some(0), ..options.clone() }, "top_k");
    fails(&[vec![1]], &GenerateOptions { top_p: Some(0.0), ..options }, "top_p");
}
