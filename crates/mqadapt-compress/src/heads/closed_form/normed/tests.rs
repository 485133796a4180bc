//! Exact where heads are equal or turned, nearer than the mean where they are neither.

use mqadapt_core::Progressing;

use super::*;
use crate::heads::closed_form::tests::{Noise, expand, geometry, inputs, random_layer};
use crate::heads::closed_form::{ClosedFormOptions, Cut, Fallback, LayerReport, Solution, merge};
use crate::qk_norm::normalise;
use crate::{Accumulator, LayerStatistics};

/// Of each head, or of all heads where the layer has such a norm of keys.
fn norms(weights: &LayerWeights, geometry: &AttentionShape, noise: &mut Noise) -> QkNorm {
    let d = geometry.head_dim;
    let (q_norm, k_norm) = match &weights.k_norm {
        Some(k_norm) => (norm_weight(d, geometry.num_attention_heads, noise), k_norm.clone()),
        None => (norm_weight(d, 1, noise), norm_weight(d, 1, noise)),
    };
    QkNorm { q_norm, k_norm, eps: 1e-6 }
}

/// The two dims of a rotary pair alike, so that a turned head is one after the norm, too.
fn norm_weight(d: usize, heads: usize, noise: &mut Noise) -> Vec<f32> {
    let of_head = |pairs: Vec<f32>| [pairs.clone(), pairs].concat();
    (0..heads).flat_map(|_| of_head(noise.vec(d / 2, 0.3).into_iter().map(|v| 1.0 + v).collect())).collect()
}

/// A layer that normalises the keys of each head, and one that normalises those of all heads together.
fn both(weights: LayerWeights, geometry: &AttentionShape, noise: &mut Noise) -> [LayerWeights; 2] {
    let k_norm = Some(norm_weight(geometry.head_dim, geometry.num_key_value_heads, noise));
    [weights.clone(), LayerWeights { k_norm, ..weights }]
}

fn statistics(weights: &LayerWeights, geometry: &AttentionShape, norms: &QkNorm, x: &[Vec<f32>]) -> LayerStatistics {
    let mut sums = Accumulator::new(geometry.clone(), &weights.o_proj, None).unwrap();
    for x in x {
        let of = |w: &[f32]| project(x, w, None, geometry.hidden_size, &Progressing::UNWATCHED).unwrap();
        let (mut q, mut k) = (of(&weights.q_proj), of(&weights.k_proj));
        normalise(&mut q, &norms.q_norm, norms.eps);
        normalise(&mut k, &norms.k_norm, norms.eps);
        sums.add_sequence(&q, &k, &of(&weights.v_proj), &Progressing::UNWATCHED).unwrap();
    }
    sums.finish()
}

/// Merges; errors of the result and of the mean on other inputs than the keys were searched on.
fn merged(
    weights: &LayerWeights,
    geometry: &AttentionShape,
    target: usize,
    noise: &mut Noise,
) -> (f64, f64, LayerReport) {
    let norms = norms(weights, geometry, noise);
    let x = inputs(geometry, &[200; 12], noise);
    let statistics = statistics(weights, geometry, &norms, &x);
    let measurement = |x: Vec<Vec<f32>>| {
        Measurement::new(weights, geometry, Some(norms.clone()), x, &Progressing::UNWATCHED).unwrap()
    };
    let seen = measurement(x);
    let options = ClosedFormOptions { cut: Cut::Measured, ..ClosedFormOptions::default() };
    let unwatched = &Progressing::UNWATCHED;
    let (merged, report) = merge(weights, geometry, target, &statistics, &options, Some(&seen), unwatched).unwrap();
    let mean = |w: &[f32]| -> Vec<f32> {
        let heads = geometry.num_key_value_heads / target;
        let head = |of: &[f32], i: usize| of.iter().skip(i).step_by(geometry.head_dim * 40).sum::<f32>() / heads as f32;
        let groups = w.chunks_exact(w.len() / target);
        groups.flat_map(|of| (0..geometry.head_dim * 40).map(move |i| head(of, i))).collect()
    };
    let k_norm = weights.k_norm.as_ref().map(|norm| {
        let width = norm.len() / target;
        let groups = norm.chunks_exact(width);
        let d = geometry.head_dim;
        groups.flat_map(|of| (0..d).map(move |i| of[i..].iter().step_by(d).sum::<f32>() / (width / d) as f32)).collect()
    });
    let (k_proj, v_proj) = (mean(&weights.k_proj), mean(&weights.v_proj));
    let averaged = LayerWeights { k_proj, v_proj, k_norm, ..weights.clone() };
    let other = measurement(inputs(geometry, &[200, 200], noise));
    let error = |weights| other.relative_error(weights, target, unwatched).unwrap();
    (error(&merged), error(&averaged), report)
}

fn compared(report: &LayerReport, solution: Solution) -> f64 {
    report.compared.iter().find(|(of, _)| *of == solution).unwrap().1
}

#[test]
fn equal_heads_merge_without_loss() {
    let mut noise = Noise(61);
    let small = AttentionShape { qk_norm: true, ..geometry(8, 2, 8, 4) };
    let weights = random_layer(&small, false, &mut noise);
    for weights in both(weights, &small, &mut noise) {
        let (weights, geometry) = expand(&weights, &small, 2);
        let (error, mean, report) = merged(&weights, &geometry, 2, &mut noise);
        assert!(error < 1e-5 && mean < 1e-5, "{error:e} {mean:e} {report:?}");
    }
}

#[test]
fn heads_turned_pair_by_pair_merge_well() {
    let mut noise = Noise(62);
    let geometry = AttentionShape { qk_norm: true, ..geometry(4, 2, 8, 4) };
    let mut weights = random_layer(&geometry, false, &mut noise);
    let (one, other) = weights.k_proj.split_at_mut(8 * 40);
    let (re, im) = other.split_at_mut(4 * 40);
    for j in 0..4 {
        let (sin, cos) = (0.5 + j as f32).sin_cos();
        for i in 0..40 {
            let (a, b) = (one[j * 40 + i], one[(j + 4) * 40 + i]);
            (re[j * 40 + i], im[j * 40 + i]) = (a * cos - b * sin, a * sin + b * cos);
        }
    }
    weights.v_proj.copy_within(..8 * 40, 8 * 40);
    let (error, mean, report) = merged(&weights, &geometry, 1, &mut noise);
    assert!(error < 0.02, "{error:e} {report:?}");
    assert!(mean > 0.3, "{mean} {report:?}");
}

#[test]
fn the_search_beats_the_mean_on_other_inputs() {
    let mut noise = Noise(63);
    let geometry = AttentionShape { qk_norm: true, ..geometry(6, 3, 8, 4) };
    let weights = random_layer(&geometry, false, &mut noise);
    for weights in both(weights, &geometry, &mut noise) {
        let (error, mean, report) = merged(&weights, &geometry, 1, &mut noise);
        assert!(error < 0.9 * mean, "{error} {mean} {report:?}");
        assert!(compared(&report, Solution::SearchedKeys) < 0.9 * compared(&report, Solution::MeanKeys), "{report:?}");
        assert!(!report.fallbacks.contains(&Fallback::MeanKeys) && report.cut.is_some());
    }
}

/// A head far larger than the others decides what a norm over all heads divides by. Where a small one alone is kept, the scale
/// keeps its keys as large as they were; without it they would be four times as large.
#[test]
fn the_scale_of_a_norm_over_heads_is_fitted() {
    let mut noise = Noise(65);
    let geometry = AttentionShape { qk_norm: true, ..geometry(4, 4, 8, 4) };
    let mut weights = random_layer(&geometry, false, &mut noise);
    weights.k_proj[..8 * 40].iter_mut().for_each(|v| *v *= 8.0);
    weights.k_norm = Some(vec![1.0; 32]);
    let (x, unwatched) = (inputs(&geometry, &[300], &mut noise), &Progressing::UNWATCHED);
    let norms = norms(&weights, &geometry, &mut noise);
    let measurement = Measurement::new(&weights, &geometry, Some(norms), x.clone(), unwatched).unwrap();
    let normed = NormedKeys::new(&weights, &geometry, Some(&measurement), unwatched).unwrap().unwrap();
    let groups = vec![vec![0, 1, 2, 3]];
    let dtype = mqadapt_core::DType::F32;
    let assembly = Assembly { weights: &weights, geometry: &geometry, groups: &groups, dtype };
    let rows = faer::Mat::from_fn(8, 32, |i, j| f64::from(u8::from(j == 16 + i)));
    let mut keys = vec![KeySolution { rows, maps: vec![faer::Mat::identity(8, 8); 4], norm_scale: 1.0 }];
    normed.fit_scale(&assembly, &mut keys, unwatched).unwrap();
    let mut merged = assembly.empty();
    assembly.write_exact_keys(&keys, &mut merged);
    let energy = |k_proj: &[f32], weight: &[f32], head: usize| -> f64 {
        let mut k = project(&x[0], k_proj, None, 40, unwatched).unwrap();
        normalise(&mut k, weight, 1e-6);
        let rows = k.chunks_exact(weight.len()).flat_map(|row| &row[8 * head..8 * head + 8]);
        rows.map(|v| f64::from(*v).powi(2)).sum()
    };
    let source = energy(&weights.k_proj, &[1.0; 32], 2);
    let found = energy(&merged.k_proj, merged.k_norm.as_ref().unwrap(), 0);
    let ratio = (found / source).sqrt();
    assert!((0.9..1.1).contains(&ratio), "{ratio} {}", keys[0].norm_scale);
}

/// Without inputs to measure on, heads keep their places and are averaged: what `mean` gives.
#[test]
fn without_inputs_a_norm_over_heads_is_averaged() {
    let mut noise = Noise(66);
    let geometry = AttentionShape { qk_norm: true, ..geometry(8, 4, 8, 4) };
    let mut weights = random_layer(&geometry, false, &mut noise);
    weights.k_norm = Some(norm_weight(8, 4, &mut noise));
    let norms = norms(&weights, &geometry, &mut noise);
    let statistics = statistics(&weights, &geometry, &norms, &inputs(&geometry, &[200; 4], &mut noise));
    let options = ClosedFormOptions::default();
    let (merged, report) = merge(&weights, &geometry, 2, &statistics, &options, None, &Progressing::UNWATCHED).unwrap();
    let norm = weights.k_norm.unwrap();
    let mean: Vec<f32> = norm.chunks_exact(16).flat_map(|of| (0..8).map(|i| f32::midpoint(of[i], of[i + 8]))).collect();
    assert_eq!(merged.k_norm.unwrap(), mean);
    assert!(
        merged.q_proj == weights.q_proj && report.regrouped.is_none() && report.fallbacks.contains(&Fallback::MeanKeys)
    );
}

/// Along the gradient, the error changes as the gradient says.
#[test]
fn the_gradient_is_that_of_the_error() {
    let mut noise = Noise(64);
    let geometry = AttentionShape { qk_norm: true, ..geometry(4, 2, 8, 3) };
    let weights = random_layer(&geometry, true, &mut noise);
    for weights in both(weights, &geometry, &mut noise) {
        gradient_holds(&weights, &geometry, &mut noise);
    }
}

fn gradient_holds(weights: &LayerWeights, geometry: &AttentionShape, noise: &mut Noise) {
    let norms = norms(weights, geometry, noise);
    let x = inputs(geometry, &[60, 30], noise);
    let unwatched = &Progressing::UNWATCHED;
    let measurement = Measurement::new(weights, geometry, Some(norms), x, unwatched).unwrap();
    let normed = NormedKeys::new(weights, geometry, Some(&measurement), unwatched).unwrap().unwrap();
    let groups = vec![vec![0, 1]];
    let assembly = Assembly { weights, geometry, groups: &groups, dtype: mqadapt_core::DType::F32 };
    let mix = |rows, columns, noise: &mut Noise| faer::Mat::from_fn(rows, columns, |_, _| f64::from(noise.next()));
    let keys =
        KeySolution { rows: mix(8, 16, noise), maps: (0..4).map(|_| mix(8, 8, noise)).collect(), norm_scale: 1.2 };
    let values = crate::heads::closed_form::values::ValueSolution { rows: keys.rows.clone(), maps: keys.maps.clone() };
    let mut merged = assembly.with_values(&[values]);
    let parts = normed.sequence_weights();
    let mut at = |keys: &KeySolution| {
        assembly.write_exact_keys(std::slice::from_ref(keys), &mut merged);
        normed.error(&assembly, &merged, &parts, unwatched).unwrap()
    };
    let by = at(&keys).1;
    let mut along = |step: f64| {
        let mut moved = keys.clone();
        moved.rows += faer::Scale(step) * &by[0].rows;
        moved.maps.iter_mut().zip(&by[0].maps).for_each(|(map, by)| *map += faer::Scale(step) * by);
        moved.norm_scale += step * by[0].norm_scale;
        at(&moved).0
    };
    let squares = by[0].maps.iter().chain([&by[0].rows]).map(|m| crate::algebra::dot(m.as_ref(), m.as_ref()));
    let slope: f64 = squares.sum::<f64>() + by[0].norm_scale.powi(2);
    assert_eq!(by[0].norm_scale != 0.0, weights.k_norm.is_some());
    let step = 1e-2 / slope.sqrt();
    let numeric = (along(step) - along(-step)) / (2.0 * step);
    assert!((numeric - slope).abs() < 1e-2 * slope, "{numeric} {slope}");
}
