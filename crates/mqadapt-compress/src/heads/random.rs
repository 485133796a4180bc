//! A freshly initialised head (the GQA paper's ablation, arXiv 2305.13245, section 3.3), drawn as transformers initialises
//! them: weights normal with `initializer_range`, biases zero, norms one.

use std::f64::consts::TAU;

use mqadapt_core::family::Module;

use crate::heads::row_merge::{MergeOptions, RowMerge, RowsAt};

pub(crate) struct Random;

impl RowMerge for Random {
    fn merge(&self, options: &MergeOptions, at: RowsAt, _heads: &[&[f32]], out: &mut [f32]) {
        if at.tensor.bias || at.tensor.module == Module::KNorm {
            out.fill(if at.tensor.bias { 0.0 } else { 1.0 });
            return;
        }
        let stream =
            mix(options.seed ^ mix(at.tensor.layer_idx as u64 * 2 + u64::from(at.tensor.module == Module::VProj)));
        for (index, value) in (at.first_value..).zip(out) {
            *value = (options.initializer_range * normal(stream, index)) as f32;
        }
    }
}

/// The `index`-th standard normal number of a stream: a counter, not a state, so that any piece can be drawn alone.
fn normal(stream: u64, index: u64) -> f64 {
    let bits = |lane: u64| mix(stream.wrapping_add(mix(2 * index + lane)));
    let uniform = |bits: u64| ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64; // in (0, 1)
    (-2.0 * uniform(bits(0)).ln()).sqrt() * (TAU * uniform(bits(1))).cos() // Box and Muller
}

/// The finaliser of `SplitMix64` (Steele, Lea and Flood 2014) on the next point of its sequence.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
