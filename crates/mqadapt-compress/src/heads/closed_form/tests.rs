//! Oracles: repeated heads merge back, halves add, threads do not matter.

use super::{ClosedFormOptions, Cut, Fallback, Measurement, merge};
use mqadapt_core::AttentionShape;

use crate::{Accumulator, Error, LayerStatistics, LayerWeights, Moment};
use mqadapt_core::Progressing;

/// Gaussian-like numbers, seeded.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn next(&mut self) -> f32 {
        let mut sum = 0.0;
        for _ in 0..4 {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            sum += (self.0 >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
        }
        sum * 1.732
    }

    pub(crate) fn vec(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.next() * scale).collect()
    }
}

pub(crate) fn geometry(heads: usize, kv: usize, d: usize, pairs: usize) -> AttentionShape {
    AttentionShape {
        num_attention_heads: heads,
        num_key_value_heads: kv,
        head_dim: d,
        hidden_size: 40,
        inv_freq: (0..pairs).map(|j| 10_000f64.powf(-(j as f64) / pairs as f64)).collect(),
        rotary_factor: 1.0,
        scaling: (d as f64).powf(-0.5),
        qk_norm: false,
        sliding_window: None,
        attn_logit_softcapping: None,
    }
}

pub(crate) fn random_layer(geometry: &AttentionShape, biases: bool, noise: &mut Noise) -> LayerWeights {
    let (d, hidden) = (geometry.head_dim, geometry.hidden_size);
    let (q, kv) = (geometry.num_attention_heads * d, geometry.num_key_value_heads * d);
    let scale = (hidden as f32).powf(-0.5);
    let mut bias = |len| biases.then(|| noise.vec(len, 0.5));
    let (q_proj_bias, k_proj_bias, v_proj_bias) = (bias(q), bias(kv), bias(kv));
    LayerWeights {
        q_proj: noise.vec(q * hidden, 2.0 * scale),
        k_proj: noise.vec(kv * hidden, scale),
        v_proj: noise.vec(kv * hidden, scale),
        o_proj: noise.vec(q * hidden, scale),
        q_proj_bias,
        k_proj_bias,
        v_proj_bias,
        k_norm: None,
    }
}

/// Each K/V head repeated `times`, one after the other.
pub(crate) fn expand(
    weights: &LayerWeights,
    geometry: &AttentionShape,
    times: usize,
) -> (LayerWeights, AttentionShape) {
    let kv = geometry.num_key_value_heads * times;
    let order: Vec<usize> = (0..geometry.num_attention_heads).collect();
    let kv_order: Vec<usize> = (0..kv).map(|g| g / times).collect();
    (weights.permute(geometry, &order, &kv_order), AttentionShape { num_key_value_heads: kv, ..geometry.clone() })
}

pub(crate) fn inputs(geometry: &AttentionShape, lengths: &[usize], noise: &mut Noise) -> Vec<Vec<f32>> {
    lengths.iter().map(|t| noise.vec(t * geometry.hidden_size, 1.0)).collect()
}

pub(crate) fn statistics(weights: &LayerWeights, geometry: &AttentionShape, sequences: &[Vec<f32>]) -> LayerStatistics {
    statistics_of(weights, geometry, sequences, &Moment::ALL)
}

pub(crate) fn statistics_of(
    weights: &LayerWeights,
    geometry: &AttentionShape,
    sequences: &[Vec<f32>],
    moments: &'static [Moment],
) -> LayerStatistics {
    let hidden = geometry.hidden_size;
    let mut sums = Accumulator::new(geometry.clone(), &weights.o_proj, None).unwrap().with_moments(moments);
    for x in sequences {
        let project = |w: &[f32], b: &Option<Vec<f32>>| {
            crate::attention::project(x, w, b.as_deref(), hidden, &Progressing::UNWATCHED).unwrap()
        };
        sums.add_sequence(
            &project(&weights.q_proj, &weights.q_proj_bias),
            &project(&weights.k_proj, &weights.k_proj_bias),
            &project(&weights.v_proj, &weights.v_proj_bias),
            &Progressing::UNWATCHED,
        )
        .unwrap();
    }
    sums.finish()
}

#[test]
fn repeated_heads_merge_back() {
    let mut noise = Noise(1);
    // heads, K/V heads before repetition, times, head_dim, rotary pairs, biases
    let cases = [
        (6, 1, 3, 8, 4, false),
        (6, 1, 3, 8, 4, true),
        (8, 2, 2, 8, 2, true),
        (8, 2, 4, 8, 0, true),
        (8, 4, 2, 6, 3, false),
        (4, 1, 4, 16, 5, false),
    ];
    for (heads, kv, times, d, pairs, biases) in cases {
        let small = geometry(heads, kv, d, pairs);
        let source = random_layer(&small, biases, &mut noise);
        let (expanded, geometry) = expand(&source, &small, times);
        let sequences = inputs(&geometry, &[150, 90], &mut noise);
        let statistics = statistics(&expanded, &geometry, &sequences);
        let measurement = Measurement::new(&expanded, &geometry, None, sequences, &Progressing::UNWATCHED).unwrap();
        for target in geometry.legal_num_key_value_heads().into_iter().filter(|t| t % kv == 0) {
            for cut in 0..=pairs {
                let options = ClosedFormOptions {
                    cut: Cut::Pairs(cut),
                    joint_iterations: 25 * (cut % 2),
                    regroup: cut % 2 == 0,
                    ..ClosedFormOptions::default()
                };
                let (merged, report) =
                    merge(&expanded, &geometry, target, &statistics, &options, None, &Progressing::UNWATCHED).unwrap();
                let error = measurement.relative_error(&merged, target, &Progressing::UNWATCHED).unwrap();
                assert!(error < 1e-5, "{heads}/{kv}x{times} d {d} pairs {pairs} -> {target}, cut {cut}: {error:e}");
                assert!(report.output_error < 1e-4 && report.logit_error.unwrap() < 1e-4, "{report:?}");
                assert_eq!(report.num_key_value_heads, target);
            }
        }
    }
}

#[test]
fn beats_the_mean_and_predicts_its_error() {
    let mut noise = Noise(2);
    let geometry = geometry(6, 3, 8, 4);
    let source = random_layer(&geometry, true, &mut noise);
    let sequences = inputs(&geometry, &[300, 300, 120], &mut noise);
    let statistics = statistics(&source, &geometry, &sequences);
    let measurement = Measurement::new(&source, &geometry, None, sequences, &Progressing::UNWATCHED).unwrap();
    let run = |options: &ClosedFormOptions| {
        merge(&source, &geometry, 1, &statistics, options, Some(&measurement), &Progressing::UNWATCHED).unwrap()
    };
    let plain =
        ClosedFormOptions { cut: Cut::Pairs(2), joint_iterations: 0, regroup: false, ..ClosedFormOptions::default() };
    let (closed, report) = run(&plain);
    let (joint, joint_report) = run(&ClosedFormOptions { joint_iterations: 25, ..plain.clone() });
    let (best, best_report) = run(&ClosedFormOptions { cut: Cut::Measured, ..plain.clone() });
    let mut mean = source.clone();
    let third = |w: &[f32]| -> Vec<f32> {
        let n = w.len() / 3;
        (0..n).map(|i| (w[i] + w[n + i] + w[2 * n + i]) / 3.0).collect()
    };
    mean.k_proj = third(&source.k_proj);
    mean.v_proj = third(&source.v_proj);
    mean.k_proj_bias = source.k_proj_bias.as_deref().map(third);
    mean.v_proj_bias = source.v_proj_bias.as_deref().map(third);
    let error = |w| measurement.relative_error(w, 1, &Progressing::UNWATCHED).unwrap();
    assert!(error(&closed) < 0.9 * error(&mean), "{} {}", error(&closed), error(&mean));
    // by their predictions alone the joint values are better; where they are measured, they are never worse than plain ones
    let predicted = |options: &ClosedFormOptions| {
        let merged = merge(&source, &geometry, 1, &statistics, options, None, &Progressing::UNWATCHED).unwrap();
        merged.1.output_error
    };
    let (joint_predicted, plain_predicted) =
        (predicted(&ClosedFormOptions { joint_iterations: 25, ..plain.clone() }), predicted(&plain));
    assert!(joint_predicted < plain_predicted, "{joint_predicted} {plain_predicted}");
    assert!(error(&joint) <= error(&closed), "{} {}, {report:?}", error(&joint), error(&closed));
    assert!(error(&best) <= error(&closed) + 1e-6, "{best_report:?}");
    assert!(best_report.measured.iter().any(|(cut, _)| Some(*cut) == best_report.cut));
    // the prediction takes heads as independent; within a third on independent weights
    let ratio = joint_report.output_error / error(&joint);
    assert!((0.66..1.5).contains(&ratio), "{ratio}");
}

#[test]
fn an_unchanged_layer_is_unchanged() {
    let geometry = geometry(4, 2, 8, 4);
    let weights = random_layer(&geometry, true, &mut Noise(3));
    let statistics = statistics(&weights, &geometry, &inputs(&geometry, &[20], &mut Noise(4)));
    let (same, report) =
        merge(&weights, &geometry, 2, &statistics, &ClosedFormOptions::default(), None, &Progressing::UNWATCHED)
            .unwrap();
    assert_eq!(same, weights);
    assert_eq!((report.output_error, report.logit_error), (0.0, Some(0.0)));
}

#[test]
fn alike_heads_are_grouped() {
    let mut noise = Noise(5);
    let small = geometry(8, 2, 8, 4);
    let source = random_layer(&small, true, &mut noise);
    let (expanded, geometry) = expand(&source, &small, 2); // heads 0 0 1 1
    // interleave the K/V heads (and their query heads): 0 1 0 1
    let mixed = expanded.permute(&geometry, &[0, 1, 4, 5, 2, 3, 6, 7], &[0, 2, 1, 3]);
    let sequences = inputs(&geometry, &[200], &mut noise);
    let statistics = statistics(&mixed, &geometry, &sequences);
    let measurement = Measurement::new(&mixed, &geometry, None, sequences, &Progressing::UNWATCHED).unwrap();
    let options = ClosedFormOptions { cut: Cut::Pairs(2), ..ClosedFormOptions::default() };
    let (merged, report) = merge(&mixed, &geometry, 2, &statistics, &options, None, &Progressing::UNWATCHED).unwrap();
    assert_eq!(report.regrouped, Some(vec![0, 2, 1, 3]));
    assert!(measurement.relative_error(&merged, 2, &Progressing::UNWATCHED).unwrap() < 1e-5);
    let options = ClosedFormOptions { regroup: false, ..options };
    let (contiguous, _) = merge(&mixed, &geometry, 2, &statistics, &options, None, &Progressing::UNWATCHED).unwrap();
    assert!(measurement.relative_error(&contiguous, 2, &Progressing::UNWATCHED).unwrap() > 1e-2);
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    let geometry = geometry(6, 3, 8, 4);
    let weights = random_layer(&geometry, true, &mut Noise(6));
    let sequences = inputs(&geometry, &[300, 140], &mut Noise(7));
    let run = |threads| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
            let statistics = statistics(&weights, &geometry, &sequences);
            let measurement =
                Measurement::new(&weights, &geometry, None, sequences.clone(), &Progressing::UNWATCHED).unwrap();
            let options = ClosedFormOptions { cut: Cut::Measured, ..ClosedFormOptions::default() };
            let merged =
                merge(&weights, &geometry, 1, &statistics, &options, Some(&measurement), &Progressing::UNWATCHED)
                    .unwrap();
            (statistics, merged)
        })
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn halves_add_and_tensors_round_trip() {
    let geometry = geometry(6, 3, 8, 3);
    let weights = random_layer(&geometry, false, &mut Noise(8));
    let sequences = inputs(&geometry, &[130, 260, 1, 17], &mut Noise(9));
    let whole = statistics(&weights, &geometry, &sequences);
    let mut halves = statistics(&weights, &geometry, &sequences[..2]);
    halves.add(&statistics(&weights, &geometry, &sequences[2..])).unwrap();
    assert_eq!(whole.tokens(), 408);
    let (a, b) = (whole.to_tensors(), halves.to_tensors());
    for (name, (shape, values)) in &a {
        assert_eq!(shape, &b[name].0);
        let size = values.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        // f64 sums in another order
        assert!(values.iter().zip(&b[name].1).all(|(x, y)| (x - y).abs() <= 1e-12 * size), "{name}");
    }
    assert_eq!(LayerStatistics::from_tensors(*whole.shape(), &a).unwrap(), whole);
    let mut broken = a.clone();
    broken.remove("query");
    let error = LayerStatistics::from_tensors(*whole.shape(), &broken).unwrap_err().to_string();
    assert!(error.contains("`query` is missing"), "{error}");
    let mut broken = a;
    broken.get_mut("tokens").unwrap().1[0] = 0.5;
    assert!(matches!(LayerStatistics::from_tensors(*whole.shape(), &broken), Err(Error::StatisticsMismatch(_))));
}

/// The sums against their definitions, in f64.
#[test]
fn sums_are_what_they_are_called() {
    let geometry = AttentionShape { sliding_window: Some(9), ..geometry(2, 2, 4, 1) };
    let (d, tokens, wide) = (4, 20, 8);
    let mut noise = Noise(10);
    let (q, k, v) = (noise.vec(tokens * wide, 1.5), noise.vec(tokens * wide, 1.0), noise.vec(tokens * wide, 1.0));
    let mut sums = Accumulator::new(geometry.clone(), &noise.vec(40 * 8, 0.3), None).unwrap();
    let outputs = sums.add_sequence(&q, &k, &v, &Progressing::UNWATCHED).unwrap();
    let tensors = sums.finish().to_tensors();
    let rotate = |x: &[f32], t: usize| -> Vec<f64> {
        let mut x: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
        let (sin, cos) = (t as f64).sin_cos();
        for head in x.chunks_exact_mut(d) {
            (head[0], head[1]) = (head[0] * cos - head[1] * sin, head[1] * cos + head[0] * sin);
        }
        x
    };
    let row = |x: &[f32], t: usize| -> Vec<f64> { x[t * wide..(t + 1) * wide].iter().map(|v| f64::from(*v)).collect() };
    for h in 0..2 {
        let (mut c, mut s, mut pair) = (vec![0.0; wide * wide], vec![0.0; wide * wide], [0.0; 8]);
        for m in 0..tokens {
            let (begin, qm) = (m.saturating_sub(8), rotate(&row_f32(&q, m, wide), m));
            let logits: Vec<f64> = (begin..=m)
                .map(|n| {
                    let kn = rotate(&row_f32(&k, n, wide), n);
                    0.5 * (0..d).map(|i| qm[h * d + i] * kn[h * d + i]).sum::<f64>()
                })
                .collect();
            let total: f64 = logits.iter().map(|l| l.exp()).sum();
            let p: Vec<f64> = logits.iter().map(|l| l.exp() / total).collect();
            let mean = |f: &dyn Fn(usize) -> Vec<f64>| -> Vec<f64> {
                (0..wide).map(|i| p.iter().enumerate().map(|(n, p)| p * f(begin + n)[i]).sum()).collect()
            };
            let (mu, out) = (mean(&|n| row(&k, n)), mean(&|n| row(&v, n)));
            let mr = mean(&|n| rotate(&row_f32(&k, n, wide), n));
            for i in 0..d {
                assert!((out[h * d + i] - f64::from(outputs[m * wide + h * d + i])).abs() < 1e-5);
            }
            for i in 0..wide {
                for j in 0..wide {
                    let second: f64 =
                        p.iter().enumerate().map(|(n, p)| p * row(&k, begin + n)[i] * row(&k, begin + n)[j]).sum();
                    c[i * wide + j] += second - mu[i] * mu[j];
                    s[i * wide + j] += out[i] * out[j];
                }
            }
            for (a, b) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                let herm = |x: &[f64]| {
                    let (ar, ai, br, bi) = (x[a * d], x[a * d + 1], x[b * d], x[b * d + 1]);
                    [ar * br + ai * bi, ai * br - ar * bi]
                };
                for (part, m) in herm(&mr).into_iter().enumerate() {
                    let second: f64 = p
                        .iter()
                        .enumerate()
                        .map(|(n, p)| p * herm(&rotate(&row_f32(&k, begin + n, wide), begin + n))[part])
                        .sum();
                    pair[2 * (2 * a + b) + part] += second - m;
                }
            }
        }
        let lower =
            |full: &[f64]| -> Vec<f64> { (0..wide).flat_map(|i| full[i * wide..=i * wide + i].to_vec()).collect() };
        let expected = [("key_centred", lower(&c)), ("value_output", lower(&s)), ("key_rotated", pair.to_vec())];
        for (name, expected) in &expected {
            let found = &tensors[*name].1[h * expected.len()..][..expected.len()];
            for (a, b) in found.iter().zip(expected.iter()) {
                assert!((a - b).abs() < 2e-4, "{name} of head {h}: {a} {b}");
            }
        }
    }
}

fn row_f32(x: &[f32], t: usize, wide: usize) -> Vec<f32> {
    x[t * wide..(t + 1) * wide].to_vec()
}

#[test]
fn q_and_k_norms_fall_back_visibly() {
    let geometry = AttentionShape { qk_norm: true, ..geometry(4, 4, 8, 4) };
    let weights = random_layer(&geometry, false, &mut Noise(11));
    let statistics = statistics(&weights, &geometry, &inputs(&geometry, &[100], &mut Noise(12)));
    let options = ClosedFormOptions { cut: Cut::Measured, ..ClosedFormOptions::default() };
    let (merged, report) = merge(&weights, &geometry, 1, &statistics, &options, None, &Progressing::UNWATCHED).unwrap();
    assert_eq!((report.fallbacks, report.cut, report.logit_error), (vec![Fallback::MeanKeys], None, None));
    assert!(report.output_error > 0.0);
    assert_eq!(merged.q_proj, weights.q_proj);
    let n = merged.k_proj.len();
    for (i, mean) in merged.k_proj.iter().enumerate() {
        let sum: f32 = (0..4).map(|g| weights.k_proj[g * n + i]).sum();
        assert!((mean - sum / 4.0).abs() < 1e-6);
    }
}

#[test]
fn wrong_arguments_are_refused() {
    let geometry = geometry(4, 4, 8, 4);
    let weights = random_layer(&geometry, false, &mut Noise(13));
    let good = statistics(&weights, &geometry, &inputs(&geometry, &[30], &mut Noise(14)));
    let options = ClosedFormOptions::default();
    let error = merge(&weights, &geometry, 3, &good, &options, None, &Progressing::UNWATCHED).unwrap_err();
    assert_eq!(error.to_string(), "4 K/V heads cannot become 3: possible are [1, 2, 4]");
    let empty = LayerStatistics::zeros(*good.shape());
    assert!(matches!(
        merge(&weights, &geometry, 1, &empty, &options, None, &Progressing::UNWATCHED),
        Err(Error::StatisticsMismatch(_))
    ));
    let measured = ClosedFormOptions { cut: Cut::Measured, ..options.clone() };
    assert!(matches!(
        merge(&weights, &geometry, 1, &good, &measured, None, &Progressing::UNWATCHED),
        Err(Error::Option(_))
    ));
    let mut short = weights.clone();
    short.k_proj.pop();
    assert!(matches!(
        merge(&short, &geometry, 1, &good, &options, None, &Progressing::UNWATCHED),
        Err(Error::Shape { name: "k_proj", .. })
    ));
    let mut bad = weights;
    bad.o_proj[0] = f32::NAN;
    assert!(merge(&bad, &geometry, 1, &good, &options, None, &Progressing::UNWATCHED).is_err());
}
