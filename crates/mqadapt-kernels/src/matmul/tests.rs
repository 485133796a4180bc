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
            for activation in [Activation::Silu, Activation::GeluTanh] {
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

#[test]
fn int8_per_row_and_per_block() {
    for (m, n, k, block) in [(1, 9, 100, 100), (5, 9, 100, 32), (8, 70, 256, 64), (2, 3, 7, 7)] {
        let x = random(1, m * k);
        let values: Vec<i8> = random(2, n * k).iter().map(|value| (value * 127.0) as i8).collect();
        let blocks = k.div_ceil(block);
        let scales: Vec<f32> = random(3, n * blocks).iter().map(|scale| scale.abs() / 127.0).collect();
        let dequantised: Vec<f64> =
            (0..n * k).map(|at| f64::from(values[at]) * f64::from(scales[at / k * blocks + at % k / block])).collect();
        let weight = WeightsRef::Int8(Int8Weights { values: &values, scales: &scales, block });
        for cpu in cpus() {
            for (precision, x64) in [(Precision::Exact, wide(&x)), (Precision::Fast, rounded(&x))] {
                let what = format!("{cpu:?} {precision:?} [{m}, {k}] x [{n}, {k}] by {block}");
                let out = product(&cpu, &x, k, weight.into(), precision);
                close(&what, &out, &naive(&x64, &dequantised, k, None), tolerance(k));
                let alone = product(&cpu, &x[(m - 1) * k..], k, weight.into(), precision);
                same(&what, &alone, &out[(m - 1) * n..]);
            }
        }
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
