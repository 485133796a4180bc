//! The forward pass: load a checkpoint, score, generate, and look inside.
//!
//! In: a [`mqadapt_checkpoint::Checkpoint`], and a plan to apply while it is read. Out: a [`Model`], whose scores are
//! those of the converted checkpoint, bit for bit. The decoder is written once, over the few operations of a backend;
//! `docs/forward.md` says how.
//!
//! ```
//! # let folder = tempfile::tempdir()?;
//! # let config = r#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "vocab_size": 11,
//! #     "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": true}"#;
//! # std::fs::write(folder.path().join("config.json"), config)?;
//! # let parsed = mqadapt_core::ModelConfig::from_json(config)?;
//! # let data: Vec<u8> = (0..88).flat_map(|i| ((i * 7 % 13) as f32 - 6.0).to_le_bytes()).collect();
//! # let views: Vec<_> = parsed.tensors().into_iter().map(|t| {
//! #     let bytes = t.shape.iter().product::<usize>() * 4;
//! #     (t.name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, t.shape, &data[..bytes]).unwrap())
//! # }).collect();
//! # safetensors::serialize_to_file(views, None, &folder.path().join("model.safetensors"))?;
//! # let folder = folder.path();
//! use mqadapt_checkpoint::Checkpoint;
//! use mqadapt_core::{NoProgress, Plan};
//! use mqadapt_model::{GenerateOptions, LoadOptions, Model};
//!
//! let checkpoint = Checkpoint::open(folder)?;
//! let plan = Plan::parse("mqa:last1", checkpoint.config())?;
//! let options = LoadOptions { plan: Some(plan), ..LoadOptions::default() };
//! let model = Model::load(&checkpoint, &options, &NoProgress)?;
//! // two choices after one context, which is computed once
//! let scores = model.loglikelihood(&[(vec![1, 2], vec![3, 4]), (vec![1, 2], vec![5])], &NoProgress)?;
//! assert!(scores.iter().all(|(logprob, _is_greedy)| *logprob < 0.0));
//! let options = GenerateOptions { max_new_tokens: 3, ..GenerateOptions::default() };
//! let texts = model.generate(&[vec![1, 2], vec![7]], &options, &mut |_index, _token| true, &NoProgress)?;
//! assert_eq!(texts[0].len(), 3);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod allocator;
mod attention;
mod backend;
mod block;
mod cache;
mod decoder;
mod error;
mod load;
mod model;
mod options;
mod rope;
mod run;
mod workspace;

pub use allocator::return_freed_memory;
pub use error::{Error, Result};
pub use load::activations::{Activations, Spill};
pub use load::streamed_layer::{CALIBRATE, StreamedLayer, embed};
pub use model::Model;
pub use mqadapt_kernels::Precision;
pub use options::{Device, GenerateOptions, LoadOptions, MOST_TOKENS_IN_FLIGHT, Perplexity, WeightFormat};
pub use run::hidden_states::{HiddenStates, LayerTrace};
pub use run::score::{Likelihood, RequestStates};
pub use run::trace::Visitor;

#[cfg(test)]
mod tests;
