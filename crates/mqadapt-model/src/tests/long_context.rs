//! Texts on both sides of the original context in one call: each is what it is alone, bit for bit on the kernels.

use mqadapt_core::{DType, NoProgress};
use serde_json::{Value, json};

use super::fixtures::{Tiny, config, difference, ids};
use crate::{Device, Error, GenerateOptions, HiddenStates, LayerTrace, Model};

const CONTEXT: usize = 40;

/// A set of frequencies beyond the context, and one for every length there.
fn models() -> [Tiny; 2] {
    let longrope = json!({ "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.4, 2.0, 3.0, 4.0, 5.0], "factor": 4.0,
        "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0], "original_max_position_embeddings": CONTEXT });
    let dynamic = json!({ "rope_type": "dynamic", "factor": 3.0 });
    let of = |scaling: Value, context: usize| {
        let over = json!({ "rope_scaling": scaling, "max_position_embeddings": context, "num_key_value_heads": 2 });
        Tiny::random(&config("llama", &over), DType::F32)
    };
    [of(longrope, 4 * CONTEXT), of(dynamic, CONTEXT)]
}

/// Texts that share beginnings, in no order.
fn texts() -> Vec<Vec<u32>> {
    let shared = ids(1, 100);
    let mut texts: Vec<_> = [60, 39, 41, 40, 100, 60, 42, 7].map(|length| shared[..length].to_vec()).into();
    texts.extend([(2, 41), (3, 90), (4, 3)].map(|(seed, length)| ids(seed, length)));
    texts
}

fn logits(model: &Model, text: &[u32]) -> Vec<f32> {
    model.logits(text, &NoProgress).unwrap()
}

#[test]
fn the_rotation_is_that_of_the_whole_text() {
    for tiny in models() {
        let (model, text) = (tiny.on(Device::Cpu), ids(1, 90));
        let whole = logits(&model, &text);
        for steps in [vec![1; 90], vec![CONTEXT, 1, 30], vec![70]] {
            assert_eq!(model.logits_in_steps(&text, &steps, &NoProgress).unwrap(), whole, "{steps:?}");
        }
        assert!(difference(&logits(&model, &text[..CONTEXT]), &whole[..CONTEXT * 97]) > 1e-2);
        // f32 sums in another order
        assert!(difference(&logits(&tiny.on(Device::CpuStock), &text), &whole) < 1e-5);
        // and nothing is left of it
        let again = logits(&model, &text[..CONTEXT]);
        assert_eq!(again, logits(&tiny.on(Device::Cpu), &text[..CONTEXT]));
    }
}

#[test]
fn scores_do_not_depend_on_what_is_scored_beside() {
    for tiny in models() {
        let requests: Vec<_> = texts()
            .into_iter()
            .enumerate()
            .map(|(nth, text)| {
                let (context, continuation) = text.split_at(1 + nth % (text.len() - 1));
                (context.to_vec(), continuation.to_vec())
            })
            .collect();
        let model = tiny.on(Device::Cpu);
        let (all, kept) = model.loglikelihood_from(&requests, None, &[1], &NoProgress).unwrap();
        for (request, score) in requests.iter().zip(&all) {
            assert_eq!(model.loglikelihood(std::slice::from_ref(request), &NoProgress).unwrap(), [*score]);
            // the last token is not read
            let read = [&request.0[..], &request.1[..request.1.len() - 1]].concat();
            let mut sum = 0.0;
            for (row, token) in logits(&model, &read).chunks(97).skip(request.0.len() - 1).zip(&request.1) {
                let total: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
                sum += f64::from(row[*token as usize]) - total.ln();
            }
            assert!((score.0 - sum).abs() < 1e-4, "{} {sum}", score.0);
        }
        for most in [1, 7, 50] {
            assert_eq!(tiny.in_flight(most).loglikelihood(&requests, &NoProgress).unwrap(), all, "{most}");
        }
        assert_eq!(model.loglikelihood_from(&requests, kept.first(), &[], &NoProgress).unwrap().0, all);
    }
}

#[test]
fn hidden_states_do_not_depend_on_what_is_beside() {
    for tiny in models() {
        let model = tiny.in_flight(50);
        let texts = texts();
        let last = model.hidden_before(3, &texts, &NoProgress).unwrap();
        let middle = model.hidden_before(1, &texts, &NoProgress).unwrap();
        assert_eq!(model.forward_from(&middle, 3, &NoProgress).unwrap(), last);
        let alone: Vec<_> = texts
            .iter()
            .flat_map(|text| model.hidden_before(3, std::slice::from_ref(text), &NoProgress).unwrap().values)
            .collect();
        assert_eq!(last.values, alone);
        let mut visitor = |_: &LayerTrace<'_>| Ok::<_, Error>(());
        let traced: HiddenStates = model.trace_layers(&texts, &mut visitor, &NoProgress).unwrap();
        assert_eq!(traced.values, alone);
        let states = model.hidden_states(&texts[4], &NoProgress).unwrap();
        let first: usize = texts[..4].iter().map(Vec::len).sum();
        assert_eq!(states[1], middle.values[first * 48..][..100 * 48]);
    }
}

#[test]
fn a_continuation_is_that_of_one_pass_over_the_whole_text() {
    for tiny in models() {
        for new in [1, 2, 20] {
            let options = GenerateOptions { max_new_tokens: new, ..GenerateOptions::default() };
            let generate = |model: &Model, prompts: &[Vec<u32>]| {
                model.generate(prompts, &options, &mut |_, _| true, &NoProgress).unwrap()
            };
            let model = tiny.on(Device::Cpu);
            let all = generate(&model, &texts());
            for (prompt, text) in texts().iter().zip(&all) {
                let read = [&prompt[..], &text[..new - 1]].concat();
                for (row, token) in logits(&model, &read).chunks(97).skip(prompt.len() - 1).zip(text) {
                    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    assert_eq!(row.iter().position(|x| *x == top), Some(*token as usize));
                }
                assert_eq!(generate(&model, std::slice::from_ref(prompt)), std::slice::from_ref(text));
            }
            for most in [1, 16] {
                assert_eq!(generate(&tiny.in_flight(most), &texts()), all, "{most}");
            }
        }
    }
}

#[test]
fn calibration_text_keeps_to_the_original_context() {
    for tiny in models() {
        let embed = |length| crate::embed(&tiny.checkpoint, &[ids(1, 5), ids(2, length)], None);
        assert!(embed(CONTEXT).is_ok());
        let error = embed(CONTEXT + 1).err().unwrap();
        assert!(
            matches!(error, Error::CalibrationContext { limit: CONTEXT, found } if found == CONTEXT + 1),
            "{error}"
        );
        assert!(tiny.on(Device::Cpu).measure_prefill(3 * CONTEXT, 1, &NoProgress).is_ok());
        assert!(tiny.on(Device::Cpu).measure_decode(3 * CONTEXT, 2, 2, &NoProgress).is_ok());
    }
}
