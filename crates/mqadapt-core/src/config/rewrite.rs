//! `config.json` of a converted model, so that transformers 4.57 and 5 load it.

use serde_json::{Map, Value, json};

use super::rope::given;
use super::{ModelConfig, RopeScaling};

/// The source's file with other K/V-head counts. Layers alike: an ordinary configuration. Layers that differ: the widest
/// count globally, the others in `per_layer_config`, and `auto_map` to the modelling file beside the weights, without
/// which transformers refuses the configuration.
pub(super) fn rewrite(source: &ModelConfig, heads: &[usize], modeling_file: &str) -> Value {
    let mut out = source.json.as_object().cloned().unwrap_or_default();
    let widest = heads.iter().copied().max().unwrap_or(source.num_attention_heads);
    let family = source.class_prefix();
    let own = if source.stored.base_model { "Model" } else { "ForCausalLM" };
    out.insert("num_key_value_heads".to_owned(), json!(widest));
    out.shift_remove("per_layer_config");
    // `head_dim` is derived from the head counts by some readers, which a Gemma contradicts: say it
    out.insert("head_dim".to_owned(), json!(source.head_dim));

    if heads.iter().all(|&own| own == widest) {
        remove_auto_map(&mut out, &format!("LayerwiseKV{family}ForCausalLM"));
        out.insert("architectures".to_owned(), json!([format!("{family}{own}")]));
    } else {
        let width = (heads.len() - 1).to_string().len().max(2);
        let differing = heads.iter().enumerate().filter(|(_, own)| **own != widest);
        let per_layer: Map<_, _> =
            differing.map(|(idx, own)| (format!("{idx:0width$}"), json!({ "num_key_value_heads": own }))).collect();
        out.insert("per_layer_config".to_owned(), Value::Object(per_layer));
        out.insert("architectures".to_owned(), json!([format!("LayerwiseKV{family}{own}")]));
        let class = |kind| format!("{modeling_file}.LayerwiseKV{family}{kind}");
        let classes = json!({ "AutoModel": class("Model"), "AutoModelForCausalLM": class("ForCausalLM") });
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
    let theta = source.rope.theta;
    let given = given(|name| out.get(name).filter(|value| !value.is_null()));
    let mut parameters = given.and_then(|(_, value)| value.as_object().cloned()).unwrap_or_default();
    if parameters.get("rope_type").is_none_or(Value::is_null) {
        let kind = parameters.remove("type").unwrap_or_else(|| json!("default"));
        parameters.insert("rope_type".to_owned(), kind);
    }
    parameters.insert("rope_theta".to_owned(), json!(theta));
    let mut scaling = parameters.clone();
    scaling.remove("rope_theta");
    let scaling = if source.rope.scaling == RopeScaling::None { Value::Null } else { Value::Object(scaling) };
    out.insert("rope_theta".to_owned(), json!(theta));
    out.insert("rope_scaling".to_owned(), scaling);
    out.insert("rope_parameters".to_owned(), Value::Object(parameters));
}
