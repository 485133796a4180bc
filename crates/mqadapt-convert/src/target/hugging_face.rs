//! The layout that transformers reads (`PreTrainedModel.save_pretrained`). Layers alike: an ordinary checkpoint; layers that
//! differ: `per_layer_config`, and a modelling file.

use std::borrow::Cow;

use mqadapt_core::{DType, Family, ModelConfig, Plan};
use serde_json::json;

use super::Target;
use crate::file_names::MODELING_FILE;

/// The modelling file for Llama; in that of another family, its transformers classes replace Llama's.
const LLAMA_MODELING: &str = include_str!("../../../../python/mqadapt_rs/modeling/modeling_mqadapt.py");
/// The one of families whose classes in transformers do not compute with any number of K/V heads, written for GPT-BigCode.
const GPT_MODELING: &str = include_str!("../../../../python/mqadapt_rs/modeling/modeling_mqadapt_gpt.py");

pub(super) struct HuggingFace;

impl Target for HuggingFace {
    fn name(&self) -> &'static str {
        "hugging-face"
    }

    fn check(&self, source: &ModelConfig, plan: &Plan) -> Result<(), String> {
        if let Some((layer, storage)) = plan.stored_layer() {
            let storage = storage.name();
            return Err(format!(
                "cannot hold how a K/V cache is stored: the plan says {storage} for layer {layer}, but a checkpoint has weights \
                 alone; leave '@{storage}' out, and give it to Model.load, or --kv {storage} to the commands that run the result"
            ));
        }
        let heads = plan.num_key_value_heads();
        if !source.family.text_config || heads.windows(2).all(|pair| pair[0] == pair[1]) {
            return Ok(());
        }
        Err(format!(
            "cannot hold this plan: the layers of a {} need one number of K/V heads, which its class in transformers reads \
             (such as 'mqa:all')",
            source.family.model_type
        ))
    }

    fn config(&self, source: &ModelConfig, plan: &Plan, dtype: Option<DType>) -> ModelConfig {
        let mut planned =
            source.with_num_key_value_heads(&plan.num_key_value_heads(), MODELING_FILE.trim_end_matches(".py"));
        if let (Some(dtype), Some(fields)) = (dtype, planned.json.as_object_mut()) {
            // transformers 5 reads `dtype`, 4 `torch_dtype` as well
            let known: Vec<_> =
                ["dtype", "torch_dtype"].into_iter().filter(|name| fields.contains_key(*name)).collect();
            for name in if known.is_empty() { vec!["dtype"] } else { known } {
                fields.insert(name.to_owned(), json!(dtype.name()));
            }
            planned.dtype = Some(dtype);
        }
        planned
    }

    fn tensor_name<'a>(&self, planned: &ModelConfig, name: &'a str) -> Cow<'a, str> {
        planned.stored_name(name)
    }

    fn files(&self, planned: &ModelConfig) -> Vec<(&'static str, String)> {
        let mut files = Vec::new();
        let class = planned.json.pointer("/architectures/0").and_then(|class| class.as_str());
        if class.is_some_and(|class| class.starts_with("LayerwiseKV")) {
            files.push((MODELING_FILE, modeling(planned.family)));
        }
        files.push(("config.json", serde_json::to_string_pretty(&planned.json).unwrap_or_default() + "\n"));
        files
    }
}

/// The modelling file for a family.
fn modeling(family: &Family) -> String {
    let (text, model, classes) = match family.stock_key_value_heads {
        None => (LLAMA_MODELING, "LlamaModel", "Llama"),
        Some(_) => (GPT_MODELING, "GPTBigCodeModel", "GPTBigCode"),
    };
    text.replace(model, family.base_model).replace(classes, family.class_prefix)
}
