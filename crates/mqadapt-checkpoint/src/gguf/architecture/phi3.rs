//! Phi-3, Phi-3.5 and Phi-4, which have queries, keys and values in one tensor, and gate and up projection in another.

use serde_json::{Map, Value, json};

use super::modules::{FUSED_ATTENTION, FUSED_MLP, NORMS_BEFORE};
use super::{Architecture, RMS_NORM_EPS};
use crate::gguf::described::{Model, object};
use crate::gguf::problem::{Parsed, Problem};

pub(super) static PHI3: Architecture = Architecture {
    name: "phi3",
    model_type: "phi3",
    class: "Phi3ForCausalLM",
    modules: &[FUSED_ATTENTION, FUSED_MLP, NORMS_BEFORE],
    permuted: false,
    norm_plus_one: false,
    partly_rotated: true,
    norm_eps: RMS_NORM_EPS,
    fields,
};

/// Relative difference between an attention factor of the file, rounded to f32, and transformers' own.
const TOLERANCE: f64 = 1e-5;

fn fields(model: &Model) -> Parsed<Map<String, Value>> {
    let keys = model.keys;
    let context = keys.required_integer("context_length")?;
    let original = keys.integer("rope.scaling.original_context_length")?.unwrap_or(context);
    let theta = keys.positive("rope.freq_base")?.unwrap_or(10_000.0);
    let rotated = rotated(model)?;
    let partial = rotated as f64 / model.sizes.head_dim as f64;
    let (scaling, parameters) = match long_rope(model, rotated)? {
        None => (Value::Null, json!({ "rope_type": "default" })),
        Some(factors) => stretched(model, &factors, context, original)?,
    };
    let mut parameters = object(parameters);
    parameters.extend(object(json!({ "rope_theta": theta, "partial_rotary_factor": partial })));
    Ok(object(json!({
        "attention_bias": false,
        "hidden_act": "silu",
        "original_max_position_embeddings": original,
        "partial_rotary_factor": partial,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_parameters": parameters,
        "sliding_window": keys.integer("attention.sliding_window")?.filter(|&window| window > 0),
    })))
}

/// Values of a head that are rotated.
fn rotated(model: &Model) -> Parsed<usize> {
    let (name, head_dim) = ("rope.dimension_count", model.sizes.head_dim);
    let Some(rotated) = model.keys.integer(name)? else { return Ok(head_dim) };
    let inside = usize::try_from(rotated).ok().filter(|rotated| (1..=head_dim).contains(rotated) && rotated % 2 == 0);
    inside.ok_or_else(|| model.keys.problem(name, format!("must be even and at most {head_dim}; found {rotated}")))
}

/// `LongRoPE`'s divisors, one per frequency.
struct Factors {
    short: Vec<f64>,
    long: Vec<f64>,
}

fn long_rope(model: &Model, rotated: usize) -> Parsed<Option<Factors>> {
    let list = |name: &str, values: &[f32]| {
        let wrong = |detail: String| Problem::tensor(name, detail);
        if values.len() != rotated / 2 {
            return Err(wrong(format!("expected {} factors, one per frequency, found {}", rotated / 2, values.len())));
        }
        // the shortest decimal of each, as the original has it
        let number =
            |value: &f32| value.to_string().parse().ok().filter(|&number: &f64| number.is_finite() && number > 0.0);
        let numbers: Option<Vec<f64>> = values.iter().map(number).collect();
        numbers.ok_or_else(|| wrong("holds a factor that is not a positive number".to_owned()))
    };
    let (short, long) = ("rope_factors_short.weight", "rope_factors_long.weight");
    match (&model.tables.short, &model.tables.long) {
        (None, None) => Ok(None),
        (Some(own), Some(other)) => Ok(Some(Factors { short: list(short, own)?, long: list(long, other)? })),
        (None, _) => Err(Problem::tensor(short, "is missing")),
        (_, None) => Err(Problem::tensor(long, "is missing")),
    }
}

/// `rope_scaling` and `rope_parameters`. The first, which transformers 4 reads, cannot name an attention factor: it is `null`
/// where the file has another than transformers computes.
fn stretched(model: &Model, factors: &Factors, context: u64, original: u64) -> Parsed<(Value, Value)> {
    let lists = json!({ "short_factor": factors.short, "long_factor": factors.long });
    let mut parameters = object(lists.clone());
    parameters.extend(object(json!({ "rope_type": "longrope", "original_max_position_embeddings": original })));
    let (context, original) = (context as f64, original as f64);
    let factor = context / original.max(1.0);
    let computed = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original.ln()).sqrt() };
    let found = model.keys.positive("rope.scaling.attn_factor")?.unwrap_or(1.0);
    if (found / computed - 1.0).abs() > TOLERANCE {
        parameters.insert("attention_factor".to_owned(), json!(found));
        return Ok((Value::Null, Value::Object(parameters)));
    }
    let mut scaling = object(lists);
    scaling.insert("type".to_owned(), json!("longrope"));
    Ok((Value::Object(scaling), Value::Object(parameters)))
}
