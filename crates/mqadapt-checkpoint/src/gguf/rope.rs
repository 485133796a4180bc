//! `RoPE` scaling: llama.cpp stores Llama 3.1's as one factor per frequency; here its parameters are found again.

use std::f64::consts::PI;

use serde_json::{Map, Value, json};

use super::described::{Model, Tables, object};
use super::metadata::ModelKeys;
use super::problem::{Parsed, Problem};

/// f32 factors against factors computed in f64: one rounding, with room for the converter's own arithmetic.
const TOLERANCE: f64 = 1e-5;

/// The fields of a model that rotates all layers alike: transformers 5 reads `rope_parameters`, 4.57 and other engines
/// `rope_theta` and `rope_scaling`.
pub(super) fn alike(model: &Model) -> Parsed<Map<String, Value>> {
    let theta = model.keys.positive("rope.freq_base")?.unwrap_or(10_000.0);
    let scaling = scaling(model.keys, model.tables, theta, model.sizes.head_dim)?;
    Ok(object(json!({
        "rope_theta": theta,
        "rope_parameters": parameters(&scaling, theta),
        "rope_scaling": scaling,
    })))
}

/// The fields of a Gemma 3, which rotates layers with a window by a base of their own, and stretches the others only.
pub(super) fn by_kind(model: &Model) -> Parsed<Map<String, Value>> {
    let theta = model.keys.positive("rope.freq_base")?.unwrap_or(10_000.0);
    let local_theta = model.keys.positive("rope.freq_base_swa")?.unwrap_or(10_000.0);
    let scaling = scaling(model.keys, model.tables, theta, model.sizes.head_dim)?;
    Ok(object(json!({
        "rope_theta": theta,
        "rope_local_base_freq": local_theta,
        "rope_parameters": {
            "full_attention": parameters(&scaling, theta),
            "sliding_attention": parameters(&Value::Null, local_theta),
        },
        "rope_scaling": scaling,
    })))
}

/// A `rope_scaling` and a base in one.
fn parameters(scaling: &Value, theta: f64) -> Value {
    let mut out = scaling.clone();
    if out.is_null() {
        out = json!({ "rope_type": "default" });
    }
    out["rope_theta"] = json!(theta);
    out
}

/// `rope_scaling` of a `config.json`, `null` where there is none.
fn scaling(keys: ModelKeys, tables: &Tables, theta: f64, head_dim: usize) -> Parsed<Value> {
    if let Some(divisors) = tables.divisors.as_ref().filter(|divisors| divisors.iter().any(|&own| own != 1.0)) {
        return llama3(divisors, theta, head_dim);
    }
    let (name, factor) = ("rope.scaling.type", "rope.scaling.factor");
    let given = keys.float(factor)?;
    let linear = match keys.metadata.text(&keys.key(name))? {
        // linear; files of 2023 have another key, and 0 is no scaling
        None => given.or(keys.float("rope.scale_linear")?).filter(|&factor| factor != 0.0),
        Some("none") => None,
        Some("linear") => Some(given.ok_or_else(|| keys.missing(factor))?),
        Some("yarn") => return yarn(keys),
        Some(other) => {
            let detail =
                format!("'{}' is not supported; supported are none, linear, yarn, and llama3", other.escape_debug());
            return Err(keys.problem(name, detail));
        }
    };
    match linear {
        None | Some(1.0) => Ok(Value::Null),
        Some(linear) if linear > 0.0 => Ok(json!({ "rope_type": "linear", "factor": linear })),
        Some(linear) => Err(keys.problem(factor, format!("must be positive; found {linear}"))),
    }
}

/// `YaRN` with the attention factor that llama.cpp and transformers compute alike.
fn yarn(keys: ModelKeys) -> Parsed<Value> {
    for (name, neutral) in [
        ("rope.scaling.attn_factor", 1.0),
        ("rope.scaling.yarn_attn_factor", 1.0),
        ("rope.scaling.yarn_ext_factor", 1.0),
        ("rope.scaling.yarn_log_multiplier", 0.0),
    ] {
        if let Some(found) = keys.float(name)?.filter(|&found| found != neutral) {
            return Err(keys.problem(name, format!("is {found}; supported is {neutral} only")));
        }
    }
    let (factor, original) = ("rope.scaling.factor", "rope.scaling.original_context_length");
    let mut out = json!({
        "rope_type": "yarn",
        "factor": keys.positive(factor)?.ok_or_else(|| keys.missing(factor))?,
        "original_max_position_embeddings": keys.integer(original)?.map_or_else(|| keys.required_integer("context_length"), Ok)?,
    });
    for beta in ["beta_fast", "beta_slow"] {
        if let Some(turns) = keys.positive(&format!("rope.scaling.yarn_{beta}"))? {
            out[beta] = json!(turns);
        }
    }
    Ok(out)
}

/// Factor `f_j` divides frequency `j`: 1 where it turns often within the original context, `factor` where it turns
/// rarely, between them `1 / f_j = (1 - s_j) / factor + s_j` with `s_j` linear in the frequency.
///
/// The line gives `original / (high - low)` and `low / (high - low)`, which leaves one free choice: `low_freq_factor` is
/// 1, as in every published model. The result is checked against every factor of the file.
fn llama3(factors: &[f32], theta: f64, head_dim: usize) -> Parsed<Value> {
    let wrong = |detail: &str| Problem::tensor("rope_freqs.weight", detail);
    if factors.len() != head_dim / 2 {
        return Err(wrong(&format!("expected {} factors, one per frequency, found {}", head_dim / 2, factors.len())));
    }
    let points: Vec<(f64, f64)> = factors
        .iter()
        .enumerate()
        .map(|(j, &factor)| (theta.powf(-((2 * j) as f64) / head_dim as f64), f64::from(factor)))
        .collect();
    let factor = points.iter().map(|&(_, factor)| factor).fold(1.0, f64::max);
    if !points.iter().all(|&(_, factor)| factor.is_finite() && factor > 0.0) {
        return Err(wrong("holds a factor that is not a positive number"));
    }
    let published = Llama3 { factor, low: 1.0, high: 4.0, original: 8192.0 };
    let candidates = [Some(published), Llama3::through(&points, factor)];
    let fitting = candidates.into_iter().flatten().find(|candidate| candidate.fits(&points));
    let Some(Llama3 { factor, low, high, original }) = fitting else {
        return Err(wrong("is not the table of a llama3 rope scaling, which is the only kind supported"));
    };
    let original: serde_json::Number = (original as i64).into(); // a whole number, as transformers checks
    Ok(json!({
        "rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }))
}

#[derive(Debug, Clone, Copy)]
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    original: f64,
}

impl Llama3 {
    /// From the first and the last blended frequency.
    fn through(points: &[(f64, f64)], factor: f64) -> Option<Self> {
        let mut blended = points.iter().filter(|&&(_, f)| f > 1.0 + TOLERANCE && f < factor * (1.0 - TOLERANCE));
        let (first, last) = (blended.next()?, blended.next_back()?);
        let smooth = |&(_, f): &(f64, f64)| (1.0 / f - 1.0 / factor) / (1.0 - 1.0 / factor);
        let slope = (smooth(first) - smooth(last)) / (first.0 - last.0);
        let offset = slope * first.0 - smooth(first);
        let high = 1.0 + 1.0 / offset;
        let original = (slope * 2.0 * PI * (high - 1.0)).round();
        // a rounded context leaves no doubt about `high` where that is a round number too
        let high = (high * 1e3).round() / 1e3;
        (offset > 0.0 && high > 1.0 && original >= 1.0).then_some(Self { factor, low: 1.0, high, original })
    }

    fn fits(&self, points: &[(f64, f64)]) -> bool {
        points.iter().all(|&(inv_freq, found)| {
            let turns = self.original * inv_freq / (2.0 * PI);
            let smooth = ((turns - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
            let expected = 1.0 / ((1.0 - smooth) / self.factor + smooth);
            (found / expected - 1.0).abs() < TOLERANCE
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::metadata::Metadata;

    /// Heads of 128 values.
    fn scaled_by(divisors: Vec<f32>, theta: f64) -> Parsed<Value> {
        let metadata = Metadata::default();
        let keys = ModelKeys { metadata: &metadata, architecture: "llama" };
        scaling(keys, &Tables { divisors: Some(divisors), ..Tables::default() }, theta, 128)
    }

    fn table(own: Llama3, theta: f64, head_dim: usize) -> Vec<f32> {
        let factor = |j: usize| {
            let turns = own.original * theta.powf(-((2 * j) as f64) / head_dim as f64) / (2.0 * PI);
            let smooth = ((turns - own.low) / (own.high - own.low)).clamp(0.0, 1.0);
            (1.0 / ((1.0 - smooth) / own.factor + smooth)) as f32
        };
        (0..head_dim / 2).map(factor).collect()
    }

    #[test]
    fn llama3_parameters_are_found_again() {
        for (factor, low, high, original) in
            [(8.0, 1.0, 4.0, 8192.0), (32.0, 1.0, 4.0, 8192.0), (4.0, 1.0, 3.0, 4096.0), (16.0, 1.0, 2.5, 2048.0)]
        {
            let factors = table(Llama3 { factor, low, high, original }, 500_000.0, 128);
            let found = scaled_by(factors, 500_000.0).unwrap();
            assert_eq!(found["factor"].as_f64(), Some(factor));
            assert_eq!(found["low_freq_factor"].as_f64(), Some(low));
            assert_eq!(found["high_freq_factor"].as_f64(), Some(high));
            assert_eq!(found["original_max_position_embeddings"].as_f64(), Some(original));
        }
    }

    #[test]
    fn another_table_is_refused() {
        let factors: Vec<f32> = (0..64).map(|j| 1.0 + j as f32).collect();
        let error = scaled_by(factors, 10_000.0).unwrap_err();
        let error = error.in_file("x".as_ref()).to_string();
        assert!(error.contains("llama3"), "{error}");
    }

    #[test]
    fn a_table_of_ones_is_no_scaling() {
        assert_eq!(scaled_by(vec![1.0; 64], 10_000.0).unwrap(), Value::Null);
    }
}
