//! Merging from calibration text, on tiny checkpoints.

use std::sync::atomic::{AtomicIsize, Ordering};

use mqadapt_compress::closed_form::{Fallback, Solution};
use mqadapt_compress::{Accumulator, Method, RefineOptions, method};
use mqadapt_core::{DType, Interrupted, LayerCache, NoProgress, Plan, Progress, Progressing};
use serde_json::{Value, json};

use super::fixtures::{Tiny, config, difference, ids};
use crate::{
    CalibratedMerge, Calibration, CalibrationOptions, Error, StatisticsFile, collect_statistics, layer_weights,
    load_calibrated, predicted_errors,
};
use mqadapt_model::{LoadOptions, Model, Precision, Spill};

fn calibration() -> Calibration {
    Calibration { sequences: vec![ids(1, 90), ids(2, 60), ids(3, 90)], target_contexts: vec![30, 80] }
}

/// A method and what it is told.
type Told = (&'static Method, CalibrationOptions);

fn closed_form(sequential: bool) -> Told {
    (method("closed-form").unwrap(), CalibrationOptions { sequential, ..CalibrationOptions::default() })
}

fn prune() -> Told {
    (method("prune").unwrap(), CalibrationOptions::default())
}

/// A merge of the text, told what a [`Told`] says.
fn merge_of(
    tiny: &Tiny,
    text: Calibration,
    (method, options): Told,
    saved: Option<StatisticsFile>,
    dtype: DType,
) -> crate::Result<CalibratedMerge<'_>> {
    CalibratedMerge::new(&tiny.checkpoint, text, method, options, saved, dtype)
}

fn exact() -> LoadOptions {
    LoadOptions { precision: Precision::Exact, kv_dtype: Some(DType::F32), ..LoadOptions::default() }
}

fn merged(tiny: &Tiny, plan: &str, told: Told, saved: Option<StatisticsFile>) -> Model {
    let plan = Plan::parse(plan, tiny.checkpoint.config()).unwrap();
    let options = LoadOptions { plan: Some(plan), ..exact() };
    let mut merge = merge_of(tiny, calibration(), told, saved, DType::F32).unwrap();
    load_calibrated(&tiny.checkpoint, &options, &mut merge, &NoProgress).unwrap()
}

/// The same model with every K/V head of every layer `times` over.
fn expanded(tiny: &Tiny, times: usize) -> Tiny {
    let config = tiny.checkpoint.config();
    let heads = config.num_key_value_heads[0];
    let tensors = config.tensors().into_iter().map(|tensor| {
        let info = tiny.checkpoint.tensor(&tensor.name).unwrap();
        let mut values = vec![0.0; info.len()];
        tiny.checkpoint.read_f32(info, 0, &mut values).unwrap();
        let mut shape = tensor.shape;
        if tensor.name.contains("k_proj") || tensor.name.contains("v_proj") {
            shape[0] *= times;
            let one = values.len() / heads;
            values = values.chunks_exact(one).flat_map(|head| head.repeat(times)).collect();
        }
        (tensor.name, shape, values)
    });
    let mut json = tiny.json();
    json["num_key_value_heads"] = json!(heads * times);
    Tiny::of(&json, DType::F32, tensors.collect())
}

fn families() -> Vec<Value> {
    vec![
        config("llama", &json!({ "num_key_value_heads": 2 })),
        config("llama", &json!({ "num_key_value_heads": 3, "attention_bias": true })),
        config("gemma", &json!({ "num_key_value_heads": 1 })),
        config("mistral", &json!({ "num_key_value_heads": 2, "sliding_window": 7 })),
        config("qwen2", &json!({ "num_key_value_heads": 3 })),
        config("qwen3", &json!({ "num_key_value_heads": 2 })),
    ]
}

#[test]
fn repeated_heads_merge_back_in_every_family() {
    let text = ids(9, 70);
    for json in families() {
        let tiny = Tiny::random(&json, DType::F32);
        let heads = tiny.checkpoint.config().num_key_value_heads[0];
        let expected = tiny.load(&exact()).logits(&text, &NoProgress).unwrap();
        let large = expanded(&tiny, 6 / heads);
        let plan = format!("gqa{heads}:all");
        for sequential in [false, true] {
            let back = merged(&large, &plan, closed_form(sequential), None);
            let error = difference(&back.logits(&text, &NoProgress).unwrap(), &expected);
            // f32 weights and activations through three layers
            assert!(error < 3e-4, "{}, sequential {sequential}: {error:e}", json["model_type"]);
        }
    }
}

#[test]
fn saved_statistics_are_those_of_the_model_and_merge_alike() {
    let json = config("llama", &json!({ "num_key_value_heads": 3, "attention_bias": true }));
    let tiny = Tiny::random(&json, DType::BF16);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.stats");
    let saved = collect_statistics(&tiny.checkpoint, &calibration(), &path, None, &NoProgress).unwrap();
    assert_eq!((saved.tokens(), saved.text()), (240, calibration().fingerprint().as_str()));
    // the whole model at once gives the same sums
    let config = tiny.checkpoint.config();
    let mut sums: Vec<_> = (0..3)
        .map(|layer_idx| {
            let o_proj = layer_weights(&tiny.checkpoint, layer_idx).unwrap().o_proj;
            Accumulator::new(config.attention(layer_idx).unwrap(), &o_proj, None).unwrap()
        })
        .collect();
    let mut visitor = |trace: &mqadapt_model::LayerTrace<'_>| -> Result<(), Error> {
        sums[trace.layer_idx].add_sequence(trace.q, trace.k, trace.v, &Progressing::UNWATCHED).map(drop).unwrap();
        Ok(())
    };
    // as a model runs by default
    tiny.load(&LoadOptions::default()).trace_layers(&calibration().sequences, &mut visitor, &NoProgress).unwrap();
    for (layer_idx, sums) in sums.into_iter().enumerate() {
        let sample = saved.layer(layer_idx, &config.attention(layer_idx).unwrap()).unwrap();
        assert_eq!(sample.statistics, sums.finish(), "layer {layer_idx}");
        assert_eq!(sample.inputs.len(), 5); // three sequences reach 30 tokens, two of them 80
    }
    // a plan merged from the file is the plan merged from the text
    let text = ids(9, 40);
    let logits = |saved| merged(&tiny, "mqa:0,2", closed_form(false), saved).logits(&text, &NoProgress).unwrap();
    let expected = logits(None);
    assert_eq!(logits(Some(StatisticsFile::open(&path).unwrap())), expected);
    assert!(difference(&expected, &tiny.load(&exact()).logits(&text, &NoProgress).unwrap()) > 1e-3);
}

#[test]
fn activations_in_files_change_nothing() {
    let tiny = Tiny::random(&config("llama", &json!({ "num_key_value_heads": 3 })), DType::BF16);
    let folder = tempfile::tempdir().unwrap();
    let spill = |max_memory| Spill { max_memory, folder: folder.path().to_owned() };
    let merged = |max_memory: u64| {
        let merge = merge_of(&tiny, calibration(), closed_form(true), None, DType::BF16);
        let mut merge = merge.unwrap().with_spill(spill(max_memory));
        let layer = |layer_idx| layer_weights(&tiny.checkpoint, layer_idx).unwrap();
        [0, 2].map(|layer_idx| {
            merge.merge_layer(layer_idx, LayerCache::heads(1), &layer(layer_idx), &NoProgress).unwrap()
        })
    };
    assert_eq!(merged(0), merged(u64::MAX));
    let collected = |max_memory: u64, name: &str| {
        let path = folder.path().join(name);
        collect_statistics(&tiny.checkpoint, &calibration(), &path, Some(&spill(max_memory)), &NoProgress).unwrap();
        std::fs::read(path).unwrap()
    };
    assert_eq!(collected(0, "a"), collected(u64::MAX, "b"));
}

#[test]
fn files_of_other_models_and_broken_ones_are_refused() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::F32);
    let other = Tiny::random(&config("llama", &json!({ "rope_theta": 500.0 })), DType::F32);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.stats");
    let saved = collect_statistics(&tiny.checkpoint, &calibration(), &path, None, &NoProgress).unwrap();
    let refused = merge_of(&other, calibration(), closed_form(false), Some(saved), DType::F32);
    let message = refused.err().unwrap().to_string();
    assert!(message.contains("collect them again"), "{message}");
    let bytes = std::fs::read(&path).unwrap();
    for (broken, why) in [(&bytes[..bytes.len() - 8], "truncated"), (&bytes[..5], "short"), (&b"{}"[..], "no header")] {
        std::fs::write(&path, broken).unwrap();
        assert!(matches!(StatisticsFile::open(&path), Err(Error::Statistics { .. })), "{why}");
    }
    let nothing = Calibration { sequences: Vec::new(), target_contexts: vec![80] };
    let refused = merge_of(&tiny, nothing, closed_form(false), None, DType::F32);
    assert!(matches!(refused, Err(Error::Argument { name: "calibration", .. })));
}

/// A copy of a model with one value of a tensor replaced.
fn with_value(tiny: &Tiny, tensor: &str, index: usize, value: f32) -> Tiny {
    let tensors = tiny.checkpoint.config().tensors().into_iter().map(|wanted| {
        let info = tiny.checkpoint.tensor(&wanted.name).unwrap();
        let mut values = vec![0.0; info.len()];
        tiny.checkpoint.read_f32(info, 0, &mut values).unwrap();
        if wanted.name == tensor {
            values[index] = value;
        }
        (wanted.name, wanted.shape, values)
    });
    Tiny::of(&tiny.json(), DType::F32, tensors.collect())
}

#[test]
fn one_flipped_bit_in_a_statistics_file_is_noticed() {
    let tiny = Tiny::random(&config("llama", &json!({ "num_key_value_heads": 2, "num_hidden_layers": 2 })), DType::F32);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.stats");
    collect_statistics(&tiny.checkpoint, &calibration(), &path, None, &NoProgress).unwrap();
    let read = || -> crate::Result<()> {
        let saved = StatisticsFile::open(&path)?;
        (0..2).try_for_each(|layer_idx| {
            saved.layer(layer_idx, &tiny.checkpoint.config().attention(layer_idx).unwrap()).map(drop)
        })
    };
    read().unwrap();
    let mut bytes = std::fs::read(&path).unwrap();
    let header = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap() + 8;
    let places = (0..header).step_by(37).chain((header..bytes.len()).step_by(bytes.len() / 199));
    for (number, at) in places.enumerate() {
        let bit = 1 << (number % 8);
        bytes[at] ^= bit;
        std::fs::write(&path, &bytes).unwrap();
        let error = read().expect_err(&format!("byte {at}, bit {bit}"));
        assert!(matches!(error, Error::Statistics { .. }), "byte {at}: {error}");
        bytes[at] ^= bit;
    }
    std::fs::write(&path, &bytes).unwrap();
    read().unwrap();
}

#[test]
fn statistics_of_a_model_that_differs_in_one_weight_are_refused() {
    let tiny = Tiny::random(&config("llama", &json!({ "num_key_value_heads": 3 })), DType::F32);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.stats");
    collect_statistics(&tiny.checkpoint, &calibration(), &path, None, &NoProgress).unwrap();
    let print = tiny.checkpoint.fingerprint().unwrap();
    for (tensor, words) in [
        ("model.embed_tokens.weight", Some("whose embedding has other weights")),
        ("model.layers.0.mlp.down_proj.weight", Some("whose layer 0 has other weights")),
        ("model.layers.1.self_attn.q_proj.weight", Some("whose layer 1 has other weights")),
        // what comes behind the merged layer has no part in its statistics
        ("model.layers.2.self_attn.q_proj.weight", None),
        ("lm_head.weight", None),
    ] {
        let other = with_value(&tiny, tensor, 2000, 0.123); // in the middle, where no sample is taken
        assert_eq!(other.checkpoint.fingerprint().unwrap(), print);
        for method in [closed_form(false), closed_form(true), prune()] {
            let saved = StatisticsFile::open(&path).unwrap();
            let mut merge = merge_of(&other, calibration(), method, Some(saved), DType::F32).unwrap();
            let weights = layer_weights(&other.checkpoint, 1).unwrap();
            let merged = merge
                .merge_layer(1, LayerCache::heads(1), &weights, &NoProgress)
                .map(drop)
                .map_err(|error| error.to_string());
            match words {
                None => merged.unwrap(),
                Some(words) => assert!(merged.as_ref().unwrap_err().contains(words), "{tensor}: {merged:?}"),
            }
        }
        let saved = StatisticsFile::open(&path).unwrap();
        let options = CalibrationOptions::default();
        let predicted = predicted_errors(
            &other.checkpoint,
            saved,
            method("mean").unwrap(),
            &options,
            &[30],
            &[(1, 1)],
            &NoProgress,
        );
        assert_eq!(predicted.is_err(), words.is_some(), "{tensor}");
    }
}

#[test]
fn weights_that_are_not_finite_are_named() {
    let tiny = Tiny::random(&config("qwen2", &json!({ "num_key_value_heads": 3 })), DType::F32);
    let folder = tempfile::tempdir().unwrap();
    for (tensor, index) in [
        ("model.embed_tokens.weight", 48 * ids(1, 90)[5] as usize + 4),
        ("model.layers.0.mlp.down_proj.weight", 777),
        ("model.layers.0.input_layernorm.weight", 7),
        ("model.layers.1.self_attn.v_proj.weight", 1000),
        ("model.layers.1.self_attn.k_proj.bias", 40),
    ] {
        for value in [f32::NAN, f32::NEG_INFINITY] {
            let broken = with_value(&tiny, tensor, index, value);
            let named = |error: &dyn std::error::Error| {
                let text = error.to_string();
                assert!(text.contains(&format!("tensor '{tensor}' holds {value} at [")), "{text}");
            };
            let path = folder.path().join("broken.stats");
            named(&collect_statistics(&broken.checkpoint, &calibration(), &path, None, &NoProgress).unwrap_err());
            assert!(!path.exists());
            let plan = Plan::parse("mqa:1", tiny.checkpoint.config()).unwrap();
            let options = LoadOptions { plan: Some(plan), ..exact() };
            for method in [closed_form(false), closed_form(true), prune()] {
                let merge = merge_of(&broken, calibration(), method, None, DType::F32);
                named(&load_calibrated(&broken.checkpoint, &options, &mut merge.unwrap(), &NoProgress).err().unwrap());
            }
            let loaded = Model::load(&broken.checkpoint, &options, &NoProgress);
            if tensor.contains("layers.1") {
                named(&loaded.err().unwrap());
            } else {
                drop(loaded.unwrap()); // it is not merged: the model runs as it is
            }
        }
    }
}

#[test]
fn a_target_context_is_no_longer_than_the_windows() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::F32);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.stats");
    let saved = || collect_statistics(&tiny.checkpoint, &calibration(), &path, None, &NoProgress).unwrap();
    assert_eq!(saved().lengths(), [60, 90]);
    let long = |sequences| Calibration { sequences, target_contexts: vec![30, 91] };
    let refusal = |message: String| {
        assert!(message.contains("91 tokens") && message.contains("has 90"), "{message}");
    };
    for method in [closed_form(false), closed_form(true), prune()] {
        let text = long(calibration().sequences);
        let refused = merge_of(&tiny, text, method, None, DType::F32);
        refusal(refused.err().unwrap().to_string());
    }
    let refused = merge_of(&tiny, long(Vec::new()), closed_form(false), Some(saved()), DType::F32);
    refusal(refused.err().unwrap().to_string());
    let options = CalibrationOptions::default();
    let predict = |contexts: &[usize]| {
        predicted_errors(&tiny.checkpoint, saved(), method("mean").unwrap(), &options, contexts, &[(0, 1)], &NoProgress)
    };
    refusal(predict(&[30, 91]).unwrap_err().to_string());
    predict(&[30, 90]).unwrap();
    let unwritten = folder.path().join("other.stats");
    let text = long(calibration().sequences);
    refusal(collect_statistics(&tiny.checkpoint, &text, &unwritten, None, &NoProgress).unwrap_err().to_string());
    assert!(!unwritten.exists());
}

#[test]
fn layers_say_what_was_done() {
    let tiny = Tiny::random(&config("qwen3", &json!({ "num_key_value_heads": 3 })), DType::F32);
    let weights = layer_weights(&tiny.checkpoint, 1).unwrap();
    let merge = |method| {
        let mut merge = merge_of(&tiny, calibration(), method, None, DType::F32).unwrap();
        let layer = merge.merge_layer(1, LayerCache::heads(1), &weights, &NoProgress).unwrap();
        // the stream is behind layer 1 now
        let back = merge.merge_layer(0, LayerCache::heads(1), &weights, &NoProgress);
        assert!(matches!(back, Err(Error::Argument { name: "layer_idx", .. })));
        layer
    };
    let layer = merge(closed_form(true));
    let error = |of| layer.report.compared.iter().find(|(solution, _)| *solution == of).unwrap().1;
    assert!(error(Solution::SearchedKeys) < error(Solution::MeanKeys), "{:?}", layer.report);
    assert!(!layer.report.fallbacks.contains(&Fallback::MeanKeys));
    let (before, after) = layer.refit.unwrap();
    assert!(0.0 < after && after < before, "{before} {after}");
    let pruned = merge(prune());
    let kept = pruned.report.kept.unwrap()[0];
    assert_eq!(pruned.weights.k_proj, weights.k_proj[kept * 16 * 48..][..16 * 48]);
}

#[test]
fn a_method_refuses_options_that_it_does_not_take() {
    let tiny = Tiny::random(&config("llama", &json!({})), DType::F32);
    let refused = |told: Told| merge_of(&tiny, calibration(), told, None, DType::F32).err().unwrap().to_string();
    let none = CalibrationOptions::default();
    let refine = Some(RefineOptions::default());
    for (options, name) in [
        (CalibrationOptions { sequential: true, ..none }, "sequential"),
        (CalibrationOptions { refine, ..none }, "refine"),
        (CalibrationOptions { fast_pairs: Some(2), ..none }, "fast_pairs"),
        (CalibrationOptions { regroup: false, ..none }, "regroup"),
    ] {
        let message = refused((prune().0, options));
        assert!(message.starts_with(name) && message.contains("'prune'"), "{message}");
    }
    assert!(refused((method("mean").unwrap(), none)).contains("'mean' reads no text"));
}

/// Stops the work after some calls, for good.
struct After(AtomicIsize);

impl Progress for After {
    fn advance(&self, _phase: &str, _done: u64, _total: u64) -> Result<(), Interrupted> {
        if self.0.fetch_sub(1, Ordering::Relaxed) <= 0 { Err(Interrupted) } else { Ok(()) }
    }
}

#[test]
fn every_part_of_a_merge_can_be_interrupted() {
    let tiny = Tiny::random(&config("llama", &json!({ "num_key_value_heads": 6 })), DType::F32);
    let weights = layer_weights(&tiny.checkpoint, 1).unwrap();
    let refine = Some(RefineOptions { steps: 2, ..RefineOptions::default() });
    let told = (closed_form(true).0, CalibrationOptions { refine, ..CalibrationOptions::default() });
    let merged = |progress: &dyn Progress| {
        let mut merge = merge_of(&tiny, calibration(), told, None, DType::F32).unwrap();
        merge.merge_layer(1, LayerCache::heads(2), &weights, progress)
    };
    let calls = After(AtomicIsize::new(isize::MAX));
    let whole = merged(&calls).unwrap();
    let calls = isize::MAX - calls.0.into_inner();
    assert!(calls > 1000, "{calls}");
    for patience in (0..calls).step_by(usize::try_from(calls / 60).unwrap()) {
        let error = merged(&After(AtomicIsize::new(patience))).unwrap_err();
        assert!(matches!(error, Error::Interrupted(_)), "after {patience} of {calls}: {error}");
    }
    assert_eq!(merged(&After(AtomicIsize::new(calls))).unwrap(), whole);
}
