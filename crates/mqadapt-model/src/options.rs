//! How a model is loaded and how it generates.

use mqadapt_compress::MergeOptions;
use mqadapt_core::{DType, Plan};
use mqadapt_kernels::Precision;

use crate::{Error, Result};

/// Where the model runs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Device {
    /// The processor, by the kernels of `mqadapt-kernels`.
    #[default]
    Cpu,
    /// The processor, by candle's own operations: what runs on a GPU, where it can be tested. Weights become f32.
    CpuStock,
    /// An NVIDIA GPU by its index (a build with the cargo feature `cuda`).
    Cuda(usize),
}

impl Device {
    /// Reads `cpu`, `cpu-stock`, `cuda`, `cuda:N`.
    ///
    /// # Errors
    /// [`Error::Device`] for anything else.
    pub fn parse(text: &str) -> Result<Self> {
        let index = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?;
        match (text, text.strip_prefix("cuda:").and_then(index)) {
            ("cpu", _) => Ok(Self::Cpu),
            ("cpu-stock", _) => Ok(Self::CpuStock),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(index)) => Ok(Self::Cuda(index)),
            _ => Err(Error::Device {
                device: text.to_owned(),
                detail: "devices are 'cpu', 'cpu-stock' and 'cuda:N'".to_owned(),
            }),
        }
    }
}

/// How weight matrices are held in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WeightFormat {
    /// As floats of their dtype.
    #[default]
    Stored,
    /// As 8-bit integers with a scale for every row, rounded from the floats: half the bytes of bf16. Unless `precision`
    /// is exact, activations become 8-bit integers, too, and products are of integers. On the processor only.
    Int8,
}

impl WeightFormat {
    /// Reads `stored`, `int8`.
    ///
    /// # Errors
    /// [`Error::Argument`] for anything else.
    pub fn parse(text: &str) -> Result<Self> {
        match text {
            "stored" => Ok(Self::Stored),
            "int8" => Ok(Self::Int8),
            _ => Err(Error::Argument { name: "weights", detail: format!("'{text}' is not one of stored, int8") }),
        }
    }
}

/// Most tokens of [`LoadOptions::max_tokens_in_flight`].
pub const MOST_TOKENS_IN_FLIGHT: usize = 1 << 20;

/// How a model is loaded.
#[derive(Debug, Clone)]
pub struct LoadOptions {
    /// Plan to apply in memory; `None`: the checkpoint as it is.
    pub plan: Option<Plan>,
    /// Merge method of the plan.
    pub method: String,
    /// Options of the merge method.
    pub merge: MergeOptions,
    /// Type of the weights; `None`: as stored.
    pub dtype: Option<DType>,
    /// How weight matrices are held in memory.
    pub weights: WeightFormat,
    /// Type of the K/V cache; `None`: that of the weights.
    pub kv_dtype: Option<DType>,
    /// Where the model runs.
    pub device: Device,
    /// How activations enter products with bf16 weights on the processor.
    pub precision: Precision,
    /// Most tokens computed in one pass: bounds the memory of scoring and generation. From 1 to [`MOST_TOKENS_IN_FLIGHT`].
    pub max_tokens_in_flight: usize,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            plan: None,
            method: "mean".to_owned(),
            merge: MergeOptions::default(),
            dtype: None,
            weights: WeightFormat::Stored,
            kv_dtype: None,
            device: Device::Cpu,
            precision: Precision::Fast,
            max_tokens_in_flight: 1024,
        }
    }
}

/// How new tokens are chosen and when a sequence ends.
#[derive(Debug, Clone)]
pub struct GenerateOptions {
    /// Most new tokens of each sequence.
    pub max_new_tokens: usize,
    /// 0: the most likely token always. Otherwise logits are divided by it.
    pub temperature: f64,
    /// Sample among this many most likely tokens; `None`: all.
    pub top_k: Option<usize>,
    /// Sample among the most likely tokens that together have at least this probability; `None`: all.
    pub top_p: Option<f64>,
    /// Seed of sampling. A sequence's draws depend on the seed and its index alone, not on what runs beside it.
    pub seed: u64,
    /// Tokens that end a sequence; the token itself is not part of the result.
    pub stop_tokens: Vec<u32>,
}

impl Default for GenerateOptions {
    fn default() -> Self {
        Self { max_new_tokens: 256, temperature: 0.0, top_k: None, top_p: None, seed: 0, stop_tokens: Vec::new() }
    }
}

/// Perplexity of a text.
#[derive(Debug, Clone, PartialEq)]
pub struct Perplexity {
    /// `exp` of the mean negative log-likelihood of all predicted tokens.
    pub perplexity: f64,
    /// Predicted tokens: `context - 1` in each window.
    pub tokens: usize,
    /// Mean negative log-likelihood of each window, in nats.
    pub window_nll: Vec<f64>,
}
