//! Streaming conversion of a checkpoint by a plan.
//!
//! In: a [`Checkpoint`](mqadapt_checkpoint::Checkpoint) and a [`Plan`](mqadapt_core::Plan). Out: a new folder with the
//! merged weights, everything else as it was, and `mqadapt.json`, which says what was done. The memory that it takes does
//! not depend on the model; the time is that of a copy.
//!
//! ```
//! # let folder = std::env::temp_dir().join(format!("mqadapt-convert-doc-{}", std::process::id()));
//! # let (src, dst) = (folder.join("src"), folder.join("dst"));
//! # std::fs::create_dir_all(&src).unwrap();
//! # let config = r#"{"model_type": "llama", "hidden_size": 4, "intermediate_size": 2, "vocab_size": 3,
//! #     "num_hidden_layers": 1, "num_attention_heads": 2, "tie_word_embeddings": true}"#;
//! # std::fs::write(src.join("config.json"), config).unwrap();
//! # let parsed = mqadapt_core::ModelConfig::from_json(config).unwrap();
//! # let data = [0u8; 64];
//! # let views: Vec<_> = parsed.tensors().into_iter().map(|t| {
//! #     let bytes = t.shape.iter().product::<usize>() * 4;
//! #     (t.name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, t.shape, &data[..bytes]).unwrap())
//! # }).collect();
//! # safetensors::serialize_to_file(views, None, &src.join("model.safetensors")).unwrap();
//! use mqadapt_checkpoint::Checkpoint;
//! use mqadapt_convert::{ConvertOptions, convert};
//! use mqadapt_core::{NoProgress, Plan};
//! use mqadapt_compress::{MergeOptions, method};
//!
//! let checkpoint = Checkpoint::open(&src)?;
//! let plan = Plan::parse("mqa:all", checkpoint.config())?;
//! let options = ConvertOptions::new(method("mean").unwrap(), MergeOptions::default());
//! let report = convert(&checkpoint, &dst, &plan, &options, &NoProgress)?;
//! assert_eq!(report.manifest.num_key_value_heads_after, [1]);
//! assert_eq!(Checkpoint::open(&dst)?.config().num_key_value_heads, [1]);
//! # std::fs::remove_dir_all(&folder).unwrap();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod convert;
mod error;
mod file_names;
mod folder;
mod layout;
mod manifest;
mod options;
mod output;
mod resume;
pub mod target;
mod transfer;
mod verify;

pub use convert::{convert, convert_layers};
pub use error::{Error, Result};
pub use file_names::MANIFEST_FILE;
pub use manifest::{Manifest, PlanRecord, ShardRecord, SourceRecord};
pub use options::{ConversionReport, ConvertOptions};
pub use output::PARTIAL_SUFFIX;
pub use target::{TARGETS, Target};
pub use verify::{Verification, verify};
