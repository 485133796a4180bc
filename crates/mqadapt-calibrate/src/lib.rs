//! Merging from calibration text: the statistics of every layer, the methods that need them, and the refit on the converted
//! stream.
//!
//! In: a [`Checkpoint`](mqadapt_checkpoint::Checkpoint), token sequences or a [`StatisticsFile`], and a layer's weights. Out: the
//! merged weights and what they cost. Layers are taken in order; besides the residual streams one layer is in memory.
//!
//! ```
//! # let folder = tempfile::tempdir()?;
//! # let config = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 11,
//! #     "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": true}"#;
//! # std::fs::write(folder.path().join("config.json"), config)?;
//! # let parsed = mqadapt_core::ModelConfig::from_json(config)?;
//! # let data: Vec<u8> = (0..88).flat_map(|i| ((i * 7 % 13) as f32 / 6.0 - 1.0).to_le_bytes()).collect();
//! # let views: Vec<_> = parsed.tensors().into_iter().map(|t| {
//! #     let bytes = t.shape.iter().product::<usize>() * 4;
//! #     (t.name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, t.shape, &data[..bytes]).unwrap())
//! # }).collect();
//! # safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors"))?;
//! # let folder = folder.path();
//! use mqadapt_calibrate::{CalibratedMerge, Calibration, CalibrationOptions, load_calibrated};
//! use mqadapt_checkpoint::Checkpoint;
//! use mqadapt_compress::method;
//! use mqadapt_core::{DType, NoProgress, Plan};
//! use mqadapt_model::LoadOptions;
//!
//! let checkpoint = Checkpoint::open(folder)?;
//! let plan = Plan::parse("mqa:last1", checkpoint.config())?;
//! let text = Calibration { sequences: vec![vec![1, 5, 2, 7, 3, 9, 4]], target_contexts: vec![4] };
//! let (method, options) = (method("prune").unwrap(), CalibrationOptions::default());
//! let mut merge = CalibratedMerge::new(&checkpoint, text, method, options, None, DType::F32)?;
//! let options = LoadOptions { plan: Some(plan), ..LoadOptions::default() };
//! let model = load_calibrated(&checkpoint, &options, &mut merge, &NoProgress)?;
//! assert_eq!(model.plan().num_key_value_heads(), [4, 1]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod calibration;
mod collector;
mod error;
mod layer_method;
mod layer_pass;
mod merge;
mod options;
mod overlay;
mod predicted_error;
mod refine;
mod refit;
mod statistics_file;
mod weights;

pub use calibration::{Calibration, LayerSample};
pub use error::{Error, Result};
pub use layer_method::CalibratedLayers;
pub use layer_pass::CalibratedLayer;
pub use merge::CalibratedMerge;
pub use options::CalibrationOptions;
pub use overlay::{load_calibrated, with_merged_layers};
pub use predicted_error::predicted_errors;
pub use statistics_file::{StatisticsFile, collect_statistics};
pub use weights::layer_weights;

#[cfg(test)]
mod tests;
