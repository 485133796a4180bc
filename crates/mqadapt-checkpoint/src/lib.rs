//! Checkpoints on disk: where every weight is, and its values.
//!
//! In: a folder in Hugging Face layout (`config.json`, one or many safetensors shards) or a GGUF file. Out: a
//! [`Checkpoint`] whose configuration, headers and index have been checked, and whose tensors are read in pieces of any
//! size, in the dtype asked for. Files are opened read-only and read with `pread`: no mapping, no copy of the model.
//!
//! ```
//! # let folder = std::env::temp_dir().join(format!("mqadapt-doc-{}", std::process::id()));
//! # std::fs::create_dir_all(&folder).unwrap();
//! # let config = r#"{"model_type": "llama", "hidden_size": 2, "intermediate_size": 2, "vocab_size": 3,
//! #     "num_hidden_layers": 1, "num_attention_heads": 1, "tie_word_embeddings": true}"#;
//! # std::fs::write(folder.join("config.json"), config).unwrap();
//! # let parsed = mqadapt_core::ModelConfig::from_json(config).unwrap();
//! # let data = [0u8; 64];
//! # let views: Vec<_> = parsed.tensors().into_iter().map(|t| {
//! #     let bytes = t.shape.iter().product::<usize>() * 4;
//! #     (t.name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, t.shape, &data[..bytes]).unwrap())
//! # }).collect();
//! # safetensors::serialize_to_file(views, None, &folder.join("model.safetensors")).unwrap();
//! use mqadapt_checkpoint::Checkpoint;
//!
//! let checkpoint = Checkpoint::open(&folder)?;
//! let embed_tokens = checkpoint.tensor("model.embed_tokens.weight").unwrap();
//! let mut row = [0.0; 2];
//! checkpoint.read_f32(embed_tokens, 2, &mut row)?; // from the third value on: the second row
//! # std::fs::remove_dir_all(&folder).unwrap();
//! # Ok::<(), mqadapt_checkpoint::Error>(())
//! ```

mod cast;
mod checkpoint;
mod contents;
mod digest;
mod error;
mod file;
mod folder;
mod gguf;
mod header;
mod index;
mod naming;
mod plan_file;
mod shard;
mod side_files;
mod tensor;
mod view;

pub use cast::{convert, convert_stored, first_not_finite, not_finite, round, store};
pub use checkpoint::{Checkpoint, read_config};
pub use error::{Error, HeaderProblem, Result};
pub use file::{MAX_CONFIG_BYTES, open_regular, read_small};
#[doc(hidden)]
pub use gguf::check_gguf_bytes;
pub use gguf::gguf_model_types;
pub use header::{Header, HeaderEntry, MAX_HEADER_BYTES};
#[doc(hidden)]
pub use index::index_shards;
pub use plan_file::{read_plan, read_plan_file};
pub use shard::{Shard, ShardHead, ShardSource};
pub use side_files::{Content, SideFile};
pub use tensor::{StoredType, TensorInfo, View};
