//! What a model is and what a plan does to it: pure data, no I/O.
//!
//! In: the text of a `config.json` and of a plan. Out: a validated [`ModelConfig`], a validated [`Plan`],
//! the tensors that such a model has, and what the plan saves.
//!
//! ```
//! use mqadapt_core::{ModelConfig, Plan, cost};
//!
//! let config = ModelConfig::from_json(r#"{
//!     "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 100,
//!     "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4
//! }"#)?;
//! let plan = Plan::parse("gqa2:all; mqa:last2", &config)?;
//! assert_eq!(plan.num_key_value_heads(), [2, 2, 1, 1]);
//! // two values (K and V) of `head_dim` numbers for each head, two bytes each
//! assert_eq!(cost::kv_bytes_per_token(&config, &plan, 2), 2 * 8 * (2 + 2 + 1 + 1) * 2);
//! # Ok::<(), mqadapt_core::Error>(())
//! ```

mod attention;
mod cache;
pub mod config;
pub mod cost;
mod error;
pub mod family;
mod plan;
mod progress;
mod readable;

pub use attention::AttentionShape;
pub use cache::{CacheForm, CacheStorage, LayerCache, LayerShape};
pub use config::{Activation, DType, ModelConfig, Rope, RopeRegime, RopeScaling};
pub use error::{Error, Result};
pub use family::{FAMILIES, Family};
pub use plan::{MergeSettings, MergeSettingsOptions, Plan, PlanDocument, TensorChange};
pub use progress::{Interrupted, NoProgress, Progress, Progressing};
pub use readable::readable;
