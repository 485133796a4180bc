use super::{MatmulOut, Store};
use crate::{
    Activation, Cpu, Int8Weights, Isa, Linear, Precision, WeightsRef,
    testing::{Stored, close, cpus, random, same},
};
use half::bf16;
use proptest::prelude::*;

/// `x · w^T + bias` in `f64`.
fn naive(x: &[f64], w: &[f64], k: usize, bias: Option<&[f32]>) -> Vec<f64> {
    let columns = |x: &[f64]| -> Vec<f64> {
        let dots = w.chunks_exact(k).map(|w| x.iter().zip(w).map(|(x, w)| x * w).sum::<f64>());
        dots.enumerate().map(|(n, dot)| dot + bias.map_or(0.0, |bias| f64::from(bias[n]))).collect()
    };
    x.chunks_exact(k).flat_map(columns).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn rounded(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| bf16::from_f32(x).to_f64()).collect()
}

fn product(cpu: &Cpu, x: &[f32], k: usize, linear: Linear<'_>, precision: Precision) -> Vec<f32> {
    let m = x.len() / k;
    let mut out = vec![f32::NAN; m * linear.weight.rows(k)];
    cpu.matmul_nt(x, m, k, &mut [MatmulOut::new(linear, &mut out)], precision, Store::Overwrite);
    out
}

/// Sums of `k` products below 1 in `f32`, in any order.
fn tolerance(k: usize) -> f64 {
    1e-7 * (8.0 + k as f64)
}

/// Every tier, dtype and precision against `f64`, and against itself with other rows in the batch.
fn check(m: usize, n: usize, k: usize, seed: u64) {
    let x = random(seed, m * k);
    let weights = Stored::random(seed + 1, n * k);
    let bias = random(seed + 2, n);
    for cpu in cpus() {
        for (weight, values) in weights.weights() {
            for precision in [Precision::Exact, Precision::Fast] {
                let what = format!("{cpu:?} {precision:?} [{m}, {k}] x [{n}, {k}]");
                let rounds = precision == Precision::Fast && matches!(weight, WeightsRef::Bf16(_));
                let x64 = if rounds { rounded(&x) } else { wide(&x) };
                for bias in [None, Some(&bias[..])] {
                    let linear = Linear { weight, bias };
                    let out = product(&cpu, &x, k, linear, precision);
                    close(&what, &out, &naive(&x64, &values, k, bias), tolerance(k));
                    for row in [0, m / 2, m - 1] {
                        let alone = product(&cpu, &x[row * k..][..k], k, linear, precision);
                        same(&what, &alone, &out[row * n..][..n]);
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_shape(m in 1usize..20, n in 1usize..40, k in 1usize..150, seed in 0u64..1000) {
        check(m, n, k, seed);
    }
}

#[test]
fn shapes_of_many_tasks() {
    check(200, 70, 96, 1);
    check(1, 3000, 64, 2);
    check(7, 5, 2048, 3);
}

#[test]
fn several_products_share_a_region() {
    let (m, k) = (5, 48);
    let x = random(1, m * k);
    let (q, kv) = (Stored::random(2, 96 * k), Stored::random(3, 33 * k));
    for cpu in cpus() {
        for precision in [Precision::Exact, Precision::Fast] {
            let (mut a, mut b, mut c) = (vec![0.0; m * 96], vec![0.0; m * 33], vec![0.0; m * 33]);
            let mut products = [
                MatmulOut::new(WeightsRef::Bf16(&q.bf16), &mut a),
                MatmulOut::new(WeightsRef::F32(&kv.f32), &mut b),
                MatmulOut::new(WeightsRef::F16(&kv.f16), &mut c),
            ];
            cpu.matmul_nt(&x, m, k, &mut products, precision, Store::Overwrite);
            same("q", &a, &product(&cpu, &x, k, WeightsRef::Bf16(&q.bf16).into(), precision));
            same("k", &b, &product(&cpu, &x, k, WeightsRef::F32(&kv.f32).into(), precision));
            same("v", &c, &product(&cpu, &x, k, WeightsRef::F16(&kv.f16).into(), precision));
        }
    }
}

#[test]
fn accumulates_onto_a_residual() {
    let (m, n, k) = (3, 10, 32);
    let (x, weights, residual) = (random(1, m * k), Stored::random(2, n * k), random(3, m * n));
    for cpu in cpus() {
        let linear = Linear::from(WeightsRef::Bf16(&weights.bf16));
        let mut out = residual.clone();
        cpu.matmul_nt(&x, m, k, &mut [MatmulOut::new(linear, &mut out)], Precision::Exact, Store::Accumulate);
        let alone = product(&cpu, &x, k, linear, Precision::Exact);
        let sum: Vec<_> = residual.iter().zip(&alone).map(|(a, b)| a + b).collect();
        same("residual", &out, &sum);
    }
}

#[test]
fn gated_equals_its_parts() {
    for (m, n, k) in [(1, 700, 40), (130, 70, 40)] {
        let x = random(1, m * k);
        let (gate, up) = (Stored::random(2, n * k), Stored::random(3, n * k));
        for cpu in cpus() {
            for activation in [Activation::Silu, Activation::GeluTanh, Activation::Gelu] {
                for precision in [Precision::Exact, Precision::Fast] {
                    let gate = Linear::from(WeightsRef::Bf16(&gate.bf16));
                    let up = Linear::from(WeightsRef::Bf16(&up.bf16));
                    let mut out = vec![0.0; m * n];
                    cpu.matmul_nt_gated(&x, m, k, gate, up, activation, &mut out, precision);
                    let (gates, ups) = (product(&cpu, &x, k, gate, precision), product(&cpu, &x, k, up, precision));
                    let mut expected = vec![0.0; m * n];
                    cpu.gate(activation, &gates, &ups, &mut expected);
                    same("gated", &out, &expected);
                }
            }
        }
    }
}

/// Random 8-bit weights `[n, k]`, their scales, and their values.
fn int8(seed: u64, n: usize, k: usize) -> (Vec<i8>, Vec<f32>, Vec<f64>) {
    let values: Vec<i8> = random(seed, n * k).iter().map(|value| (value * 127.5).round() as i8).collect();
    let scales: Vec<f32> = random(seed + 1, n).iter().map(|scale| scale.abs() / 127.0).collect();
    let wide = (0..n * k).map(|at| f64::from(values[at]) * f64::from(scales[at / k])).collect();
    (values, scales, wide)
}

#[test]
fn int8_with_exact_activations() {
    for (m, n, k) in [(1, 9, 100), (5, 9, 100), (8, 70, 256), (2, 3, 7)] {
        let x = random(1, m * k);
        let (values, scales, dequantised) = int8(2, n, k);
        let weight = WeightsRef::Int8(Int8Weights { values: &values, scales: &scales });
        for cpu in cpus() {
            let what = format!("{cpu:?} [{m}, {k}] x [{n}, {k}]");
            let out = product(&cpu, &x, k, weight.into(), Precision::Exact);
            close(&what, &out, &naive(&wide(&x), &dequantised, k, None), tolerance(k));
            let alone = product(&cpu, &x[(m - 1) * k..], k, weight.into(), Precision::Exact);
            same(&what, &alone, &out[(m - 1) * n..]);
        }
    }
}

/// A row as 8-bit integers become of it, those above 127 of 16 bits.
fn quantised(row: &[f32]) -> Vec<f64> {
    let largest = row.iter().fold(0.0, |most: f64, x| most.max(f64::from(x.abs())));
    let rms = (row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / row.len() as f64).sqrt();
    let scale = largest.min(6.0 * rms) / 127.0;
    row.iter().map(|x| (f64::from(*x) / scale).round_ties_even() * scale).collect()
}

/// Every tier has the bits of the scalar one, whatever the other rows of the batch, and the values of integer products.
#[test]
fn int8_with_quantised_activations() {
    for (m, n, k, spike) in [
        (1, 9, 100, 1.0),
        (5, 9, 128, 30.0),
        (97, 70, 256, 1000.0),
        (2, 3, 7, 2.0),
        (3, 6, 9000, 50.0),
        (7, 5, 8192, 1.0),
    ] {
        let mut x = random(1, m * k);
        for (row, x) in x.chunks_exact_mut(k).enumerate() {
            x[row * 31 % k] *= spike; // a few activations beyond 127 steps
            x[k - 1] *= -spike;
        }
        let (values, scales, dequantised) = int8(2, n, k);
        let weight = WeightsRef::Int8(Int8Weights { values: &values, scales: &scales });
        let bias = random(5, n);
        let linear = Linear { weight, bias: Some(&bias) };
        let scalar = product(&Cpu::new(Isa::Scalar, 1), &x, k, linear, Precision::Fast);
        let rounded: Vec<f64> = x.chunks_exact(k).flat_map(quantised).collect();
        // a step that falls between two integers may go either way
        let size = x.iter().fold(0.0, |most: f64, x| most.max(f64::from(x.abs())));
        let expected = naive(&rounded, &dequantised, k, Some(&bias));
        close("scalar", &scalar, &expected, size * (tolerance(k) + 1e-5));
        for cpu in cpus() {
            let what = format!("{cpu:?} [{m}, {k}] x [{n}, {k}]");
            let out = product(&cpu, &x, k, linear, Precision::Fast);
            same(&what, &out, &scalar);
            for row in [0, m / 2, m - 1] {
                same(&what, &product(&cpu, &x[row * k..][..k], k, linear, Precision::Fast), &out[row * n..][..n]);
            }
        }
    }
}

#[test]
fn int8_activations_of_any_size() {
    let (n, k) = (4, 70);
    let (values, scales, dequantised) = int8(2, n, k);
    let weight = WeightsRef::Int8(Int8Weights { values: &values, scales: &scales });
    for size in [0.0, 1e-30, 1e30] {
        let x: Vec<f32> = random(1, k).iter().map(|x| x * size).collect();
        for cpu in cpus() {
            let out: Vec<f32> =
                product(&cpu, &x, k, weight.into(), Precision::Fast).iter().map(|out| out / size.max(1e-30)).collect();
            let x: Vec<f64> = x.iter().map(|x| f64::from(*x) / f64::from(size.max(1e-30))).collect();
            close(&format!("{cpu:?} {size}"), &out, &naive(&x, &dequantised, k, None), 0.05);
        }
    }
    let mut x = random(1, 2 * k);
    (x[3], x[k + 5]) = (f32::NAN, f32::INFINITY);
    for cpu in cpus() {
        assert!(product(&cpu, &x, k, weight.into(), Precision::Fast).iter().all(|out| out.is_nan()));
    }
}

#[test]
fn nan_is_not_lost() {
    let x = [1.0, f32::NAN];
    let weights = Stored::random(1, 2);
    for cpu in cpus() {
        for (weight, _) in weights.weights() {
            for precision in [Precision::Exact, Precision::Fast] {
                assert!(product(&cpu, &x, 2, weight.into(), precision)[0].is_nan());
            }
        }
    }
}

#[test]
#[should_panic(expected = "x is [2, 3]")]
fn wrong_shape_panics() {
    let mut out = [0.0; 2];
    let product = MatmulOut::new(WeightsRef::F32(&[0.0; 3]), &mut out);
    Cpu::new(Isa::Scalar, 1).matmul_nt(&[0.0; 5], 2, 3, &mut [product], Precision::Exact, Store::Overwrite);
}
