//! Small checkpoints with random weights, made without any of our own writing code.

use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use mqadapt_checkpoint::Checkpoint;
use mqadapt_core::{DType, ModelConfig};
use safetensors::tensor::TensorView;
use tempfile::TempDir;

/// A Llama of four layers with eight K/V heads of ten values each.
pub const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 24,
    "intermediate_size": 40, "vocab_size": 50, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 10,
    "num_key_value_heads": 8, "torch_dtype": "bfloat16"}"#;

/// A checkpoint to be written.
pub struct Synthetic {
    /// The text of `config.json`.
    pub config: String,
    /// Type of the stored weights.
    pub dtype: DType,
    /// Tensors in each file; 0: one file for all.
    pub per_shard: usize,
    /// Largest absolute value.
    pub scale: f32,
}

impl Default for Synthetic {
    fn default() -> Self {
        Self { config: CONFIG.to_owned(), dtype: DType::BF16, per_shard: 0, scale: 1.0 }
    }
}

impl Synthetic {
    /// Writes it into `folder`, with a tokenizer and a licence beside it.
    pub fn write(&self, folder: &Path) {
        fs::create_dir_all(folder.join("additional_chat_templates")).unwrap();
        fs::write(folder.join("config.json"), &self.config).unwrap();
        fs::write(folder.join("tokenizer.json"), "{\"not\": \"read\"}").unwrap();
        fs::write(folder.join("LICENSE"), "free").unwrap();
        fs::write(folder.join("additional_chat_templates/tool.jinja"), "{{ x }}").unwrap();
        fs::write(folder.join("pytorch_model.bin"), "the same weights once more").unwrap();
        let mut tensors = ModelConfig::from_json(&self.config).unwrap().tensors();
        tensors.sort_by(|a, b| a.name.cmp(&b.name)); // as safetensors writes them: not in the order of the forward pass
        let mut random = 1u64;
        let data: Vec<_> = tensors
            .into_iter()
            .map(|tensor| {
                let count = tensor.shape.iter().product::<usize>();
                let bytes: Vec<u8> = (0..count).flat_map(|_| self.value(&mut random)).collect();
                (tensor.name, tensor.shape, bytes)
            })
            .collect();
        let per_shard = if self.per_shard == 0 { data.len() } else { self.per_shard };
        let count = data.len().div_ceil(per_shard);
        let mut weight_map = serde_json::Map::new();
        for (number, tensors) in data.chunks(per_shard).enumerate() {
            let name = match self.per_shard {
                0 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            weight_map.extend(tensors.iter().map(|(tensor, ..)| (tensor.clone(), name.clone().into())));
            let views = tensors.iter().map(|(name, shape, bytes)| {
                (name.clone(), TensorView::new(self.safetensors_dtype(), shape.clone(), bytes).unwrap())
            });
            let metadata = [("format".to_owned(), "pt".to_owned())].into_iter().collect();
            safetensors::serialize_to_file(views, Some(metadata), &folder.join(name)).unwrap();
        }
        if self.per_shard > 0 {
            let index = serde_json::json!({ "metadata": {}, "weight_map": weight_map });
            fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
        }
    }

    /// Writes it into a new folder.
    pub fn folder(&self) -> TempDir {
        let folder = TempDir::new().unwrap();
        self.write(folder.path());
        folder
    }

    fn value(&self, random: &mut u64) -> Vec<u8> {
        *random ^= *random << 13;
        *random ^= *random >> 7;
        *random ^= *random << 17;
        let value = (*random >> 40) as f32 / (1 << 23) as f32 * self.scale - self.scale;
        match self.dtype {
            DType::F32 => value.to_le_bytes().to_vec(),
            DType::F16 => f16::from_f32(value).to_le_bytes().to_vec(),
            DType::BF16 => bf16::from_f32(value).to_le_bytes().to_vec(),
        }
    }

    fn safetensors_dtype(&self) -> safetensors::Dtype {
        match self.dtype {
            DType::F32 => safetensors::Dtype::F32,
            DType::F16 => safetensors::Dtype::F16,
            DType::BF16 => safetensors::Dtype::BF16,
        }
    }
}

/// All values of a tensor.
pub fn values(checkpoint: &Checkpoint, name: &str) -> Vec<f32> {
    let tensor = checkpoint.tensor(name).unwrap_or_else(|| panic!("no tensor {name}"));
    let mut out = vec![0.0; tensor.len()];
    checkpoint.read_f32(tensor, 0, &mut out).unwrap();
    out
}

/// The files below a folder and their content, by name.
pub fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut out = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(inner) = folders.pop() {
        for entry in fs::read_dir(inner).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                out.push((path.strip_prefix(folder).unwrap().to_owned(), fs::read(&path).unwrap()));
            }
        }
    }
    out.sort();
    out
}
