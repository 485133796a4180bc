//! Tiny checkpoints, written to a temporary folder.

use std::fs;

use half::bf16;
use mqadapt_checkpoint::Checkpoint;
use mqadapt_core::family::LayerTensor;
use mqadapt_core::{DType, FAMILIES, ModelConfig, NoProgress};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::{LoadOptions, Model};

/// A checkpoint in a folder that lives as long as it.
pub(super) struct Tiny {
    pub checkpoint: Checkpoint,
    folder: TempDir,
}

/// Numbers from a counter: uniform in `[-1, 1)`.
pub(super) fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

pub(super) fn ids(seed: u64, len: usize) -> Vec<u32> {
    noise(seed, len).iter().map(|x| (x + 1.0).to_bits() % 97).collect()
}

/// `config.json` of a tiny model, `head_dim` unequal `hidden_size / num_attention_heads`; `over` replaces fields.
pub(super) fn config(model_type: &str, over: &Value) -> Value {
    let mut config = json!({
        "model_type": model_type, "hidden_size": 48, "intermediate_size": 80, "vocab_size": 97, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 16, "max_position_embeddings": 512,
        "rope_theta": 1000.0,
    });
    for (field, value) in over.as_object().into_iter().flatten() {
        config[field] = value.clone();
    }
    let family = FAMILIES.iter().find(|family| family.model_type == model_type).unwrap();
    for (field, own) in family.field_names {
        if let Some(value) = config.as_object_mut().unwrap().remove(*field) {
            config[*own] = value;
        }
    }
    config
}

impl Tiny {
    /// Random weights of the spread of a trained model's, so that logits differ and attention is not flat.
    pub(super) fn random(json: &Value, dtype: DType) -> Self {
        let config = ModelConfig::from_value(json.clone()).unwrap();
        let values = config.tensors().into_iter().enumerate().map(|(nth, tensor)| {
            let len = tensor.shape.iter().product();
            let (scale, shift) = match (tensor.shape.len(), config.family.forward.norm_weight_plus_one) {
                (2, _) => (0.25, 0.0),
                (_, true) => (0.3, 0.0),
                _ if tensor.name.contains("_proj.") || tensor.name.contains(".bias") => (0.3, 0.0),
                _ => (0.3, 1.0),
            };
            let values = noise(nth as u64 + 1, len).into_iter().map(|x| x * scale + shift).collect();
            (tensor.name, tensor.shape, values)
        });
        Self::of(json, dtype, values.collect())
    }

    pub(super) fn of(json: &Value, dtype: DType, tensors: Vec<(String, Vec<usize>, Vec<f32>)>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("config.json"), json.to_string()).unwrap();
        let bytes: Vec<_> = stored(json, tensors)
            .into_iter()
            .map(|(name, shape, values)| {
                let bytes: Vec<u8> = match dtype {
                    DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                    DType::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
                    DType::F16 => values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect(),
                };
                (name, shape, bytes)
            })
            .collect();
        let stored_type = match dtype {
            DType::F32 => Dtype::F32,
            DType::BF16 => Dtype::BF16,
            DType::F16 => Dtype::F16,
        };
        let views = bytes
            .iter()
            .map(|(name, shape, bytes)| (name.as_str(), TensorView::new(stored_type, shape.clone(), bytes).unwrap()));
        safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors")).unwrap();
        Self { checkpoint: Checkpoint::open(folder.path()).unwrap(), folder }
    }

    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&fs::read_to_string(self.folder.path().join("config.json")).unwrap()).unwrap()
    }

    pub(super) fn load(&self, options: &LoadOptions) -> Model {
        Model::load(&self.checkpoint, options, &NoProgress).unwrap()
    }
}

/// A tensor's name, shape and values.
type Named = (String, Vec<usize>, Vec<f32>);

/// Tensors as the family's files have them: several in one, transposed.
fn stored(json: &Value, tensors: Vec<Named>) -> Vec<Named> {
    let config = ModelConfig::from_value(json.clone()).unwrap();
    let mut groups: Vec<(String, Vec<Named>)> = Vec::new();
    for tensor in tensors {
        let name = config.stored_name(&tensor.0).into_owned();
        match groups.iter_mut().find(|(known, _)| *known == name) {
            Some((_, parts)) => parts.push(tensor),
            None => groups.push((name, vec![tensor])),
        }
    }
    groups.into_iter().map(|(name, parts)| joined(&config, name, parts)).collect()
}

fn joined(config: &ModelConfig, name: String, parts: Vec<Named>) -> Named {
    let Some(LayerTensor { module, bias, .. }) = LayerTensor::parse(&parts[0].0) else {
        let (_, shape, values) = parts.into_iter().next().unwrap();
        return (name, shape, values);
    };
    let mut shape = parts[0].1.clone();
    shape[0] = parts.iter().map(|(_, shape, _)| shape[0]).sum();
    let columns = shape.get(1).copied().unwrap_or(1);
    let interleaved = config.family.fused_with(module).is_some_and(|fused| fused.interleaved);
    let run = if interleaved { config.head_dim * columns } else { usize::MAX };
    let mut runs: Vec<_> = parts.iter().map(|(.., values)| values.chunks(run.min(values.len()))).collect();
    let mut values = Vec::new();
    while values.len() < shape.iter().product() {
        for run in &mut runs {
            values.extend(run.next().unwrap());
        }
    }
    if config.family.transposed && !bias && shape.len() == 2 {
        let rows = shape[0];
        values = (0..values.len()).map(|at| values[at % rows * columns + at / rows]).collect();
        shape.reverse();
    }
    (name, shape, values)
}

/// Largest difference, relative to the largest value.
pub(super) fn difference(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0f32, |most, x| most.max(x.abs()));
    assert!(largest > 0.0 && a.iter().chain(b).all(|x| x.is_finite()));
    f64::from(a.iter().zip(b).fold(0f32, |most, (a, b)| most.max((a - b).abs())) / largest)
}
