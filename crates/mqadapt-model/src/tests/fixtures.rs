//! Tiny checkpoints, written to a temporary folder.

use std::fs;

use half::bf16;
use mqadapt_checkpoint::Checkpoint;
use mqadapt_core::{DType, ModelConfig, NoProgress};
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
                _ if tensor.name.contains("_proj.") => (0.3, 0.0),
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

/// Tensors as the family's files have them: neighbours that share one, their rows one under the other.
fn stored(json: &Value, tensors: Vec<(String, Vec<usize>, Vec<f32>)>) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let config = ModelConfig::from_value(json.clone()).unwrap();
    let mut out: Vec<(String, Vec<usize>, Vec<f32>)> = Vec::new();
    for (role, shape, values) in tensors {
        let name = config.stored_name(&role).into_owned();
        match out.last_mut() {
            Some(last) if last.0 == name => {
                last.1[0] += shape[0];
                last.2.extend(values);
            }
            _ => out.push((name, shape, values)),
        }
    }
    out
}

/// Largest difference, relative to the largest value.
pub(super) fn difference(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let largest = b.iter().fold(0f32, |most, x| most.max(x.abs()));
    assert!(largest > 0.0 && a.iter().chain(b).all(|x| x.is_finite()));
    f64::from(a.iter().zip(b).fold(0f32, |most, (a, b)| most.max((a - b).abs())) / largest)
}
