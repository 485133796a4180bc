//! `config.json` of a converted model, so that transformers 4.57 and 5 load it.

use serde_json::{Map, Value, json};

use super::rope::given;
use super::{ModelConfig, RopeScaling};
use crate::family::{Family, Rotary};

/// The source's file with other K/V-head counts. Layers alike: an ordinary configuration. Layers that differ: the widest
/// count globally, the others in `per_layer_config`, and `auto_map` to the modelling file beside the weights, without
/// which transformers refuses the configuration.
///
/// `family`: the one that the result is written as. As its source's, a family with K/V heads of its own in another stays as it is.
pub(super) fn rewrite(source: &ModelConfig, family: &Family, heads: &[usize], modeling_file: &str) -> Value {
    let mut out = source.json.as_object().cloned().unwrap_or_default();
    if source.json["model_type"] != json!(source.family.model_type) {
        // a person insists that it is one of the family, whose class computes it then
        out.insert("model_type".to_owned(), json!(family.model_type));
        out.shift_remove("auto_map");
    }
    if family.merged.is_some() {
        return Value::Object(out);
    }
    if let Some(Value::Object(text)) = out.get_mut("text_config").filter(|_| source.family.text_config) {
        // of models that read more than text: the language model is one part, and its layers are alike
        text.insert("num_key_value_heads".to_owned(), json!(heads.iter().max()));
        text.insert("head_dim".to_owned(), json!(source.head_dim));
        return Value::Object(out);
    }
    let widest = heads.iter().copied().max().unwrap_or(source.num_attention_heads);
    let (base_model, causal_lm) = (family.base_model, format!("{}ForCausalLM", family.class_prefix));
    let own = if source.stored.prefix.is_empty() { base_model } else { &causal_lm };
    out.insert("num_key_value_heads".to_owned(), json!(widest));
    out.shift_remove("per_layer_config");
    // `head_dim` is derived from the head counts by some readers, which a Gemma contradicts: say it
    out.insert("head_dim".to_owned(), json!(source.head_dim));
    out.insert("model_type".to_owned(), json!(family.model_type));
    out.extend(family.requires.iter().map(|(field, value)| ((*field).to_owned(), json!(value))));

    let alike = heads.iter().all(|&own| own == widest);
    if alike && family.stock_key_value_heads.is_none_or(|stock| stock == widest) {
        remove_auto_map(&mut out, &format!("LayerwiseKV{causal_lm}"));
        out.insert("architectures".to_owned(), json!([own]));
    } else {
        let width = (heads.len() - 1).to_string().len().max(2);
        let differing = heads.iter().enumerate().filter(|(_, own)| **own != widest);
        let per_layer: Map<_, _> =
            differing.map(|(idx, own)| (format!("{idx:0width$}"), json!({ "num_key_value_heads": own }))).collect();
        if !alike {
            out.insert("per_layer_config".to_owned(), Value::Object(per_layer));
        }
        out.insert("architectures".to_owned(), json!([format!("LayerwiseKV{own}")]));
        let class = |name| format!("{modeling_file}.LayerwiseKV{name}");
        let classes = json!({ "AutoModel": class(base_model), "AutoModelForCausalLM": class(&causal_lm) });
        out.insert("auto_map".to_owned(), classes);
    }
    write_rope(source, &mut out);
    Value::Object(out)
}

/// Drops an `auto_map` of ours (the source was converted before, and its layers are alike again); keeps a foreign one.
fn remove_auto_map(out: &mut Map<String, Value>, ours: &str) {
    let is_ours = |map: &Value| map["AutoModelForCausalLM"].as_str().is_some_and(|class| class.ends_with(ours));
    if out.get("auto_map").is_some_and(is_ours) {
        out.shift_remove("auto_map");
    }
}

/// Both spellings: transformers 5 reads `rope_parameters`; 4.x, MLX and llama.cpp read `rope_theta` and `rope_scaling`.
fn write_rope(source: &ModelConfig, out: &mut Map<String, Value>) {
    let rotary = source.family.forward.rotary;
    if let Rotary::ByKind { local_field, .. } = rotary {
        return write_ropes_by_kind(local_field, out);
    }
    let Some(rope) = source.rope.iter().flatten().next() else { return };
    let given = given(|name| out.get(name).filter(|value| !value.is_null()));
    let mut parameters = given.and_then(|(_, value)| value.as_object().cloned()).unwrap_or_default();
    if parameters.get("rope_type").is_none_or(Value::is_null) {
        let kind = parameters.remove("type").unwrap_or_else(|| json!("default"));
        parameters.insert("rope_type".to_owned(), kind);
    }
    parameters.insert("rope_theta".to_owned(), json!(rope.theta));
    if let Rotary::Fraction(default) = rotary {
        let given = out.get("rotary_pct").filter(|value| !value.is_null());
        let factor = parameters.get("partial_rotary_factor").or(given).cloned().unwrap_or_else(|| json!(default));
        parameters.insert("partial_rotary_factor".to_owned(), factor.clone());
        out.insert("rotary_pct".to_owned(), factor);
        out.insert("rotary_emb_base".to_owned(), json!(rope.theta));
    }
    if let Some(factor) = parameters.get("partial_rotary_factor").filter(|_| rotary == Rotary::Partial) {
        // a Phi-3's `rope_scaling` has no place for it, so both versions read it beside
        out.insert("partial_rotary_factor".to_owned(), factor.clone());
    }
    let scaling = match (&rope.scaling, rotary) {
        (RopeScaling::None, _) => Value::Null,
        (_, Rotary::Partial) => old_phi3(&parameters),
        _ => {
            let mut scaling = parameters.clone();
            scaling.remove("rope_theta");
            Value::Object(scaling)
        }
    };
    out.insert("rope_theta".to_owned(), json!(rope.theta));
    out.insert("rope_scaling".to_owned(), scaling);
    out.insert("rope_parameters".to_owned(), Value::Object(parameters));
}

/// The old spelling of parameters by kind of layer, where the file has the new one alone; a file with the old one stays as it is,
/// since version 5 reads that, too.
fn write_ropes_by_kind(local_field: Option<&str>, out: &mut Map<String, Value>) {
    let Some(Value::Object(kinds)) = out.get("rope_parameters").cloned() else { return };
    let of = |kind: &str| kinds.get(kind).and_then(Value::as_object);
    if let Some(global) = of("full_attention").filter(|_| out.get("rope_scaling").is_none_or(Value::is_null)) {
        let mut scaling = global.clone();
        let theta = scaling.remove("rope_theta");
        let kind = scaling.get("rope_type").and_then(Value::as_str).unwrap_or("default");
        let scaling = if kind == "default" { Value::Null } else { Value::Object(scaling) };
        out.extend(theta.map(|theta| ("rope_theta".to_owned(), theta)));
        out.insert("rope_scaling".to_owned(), scaling);
    }
    let local = of("sliding_attention").and_then(|local| local.get("rope_theta"));
    out.extend(local_field.zip(local).map(|(field, theta)| (field.to_owned(), theta.clone())));
}

/// What transformers 4.x takes for a Phi-3: three fields and no more; `null` where there is more to say.
fn old_phi3(parameters: &Map<String, Value>) -> Value {
    let lists = ["short_factor", "long_factor"];
    let known = ["rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"];
    if parameters.keys().any(|key| !lists.contains(&key.as_str()) && !known.contains(&key.as_str())) {
        return Value::Null;
    }
    let mut out = Map::from_iter([("type".to_owned(), json!("longrope"))]);
    out.extend(lists.iter().filter_map(|list| Some(((*list).to_owned(), parameters.get(*list)?.clone()))));
    Value::Object(out)
}
