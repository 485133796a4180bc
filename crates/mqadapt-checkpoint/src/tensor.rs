//! What is known of a tensor without reading its values.

use std::fmt;

use candle_core::quantized::GgmlDType;
use mqadapt_core::DType;

/// How a tensor's values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoredType {
    /// Floats that can be computed with.
    Float(DType),
    /// 64-bit floats: computed with as f32.
    F64,
    /// Another type of safetensors: passed on unchanged, never computed with.
    Other(safetensors::Dtype),
    /// Blocks of llama.cpp's quantisation.
    Ggml(GgmlDType),
}

impl StoredType {
    /// The dtype, if values are stored one by one as floats that can be computed with.
    #[must_use]
    pub fn float(self) -> Option<DType> {
        match self {
            Self::Float(dtype) => Some(dtype),
            _ => None,
        }
    }

    /// The dtype that values are computed in unless another is asked for, if they are stored one by one as floats.
    #[must_use]
    pub fn computed(self) -> Option<DType> {
        match self {
            Self::F64 => Some(DType::F32),
            stored => stored.float(),
        }
    }

    /// Bytes of one value, if values are stored one by one as floats.
    #[must_use]
    pub fn value_bytes(self) -> Option<usize> {
        match self {
            Self::F64 => Some(8),
            stored => stored.float().map(DType::bytes),
        }
    }

    /// Its name in `config.json`, if values are stored one by one as floats.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        match self {
            Self::F64 => Some("float64"),
            stored => stored.float().map(DType::name),
        }
    }

    /// The dtype of a safetensors header; `None` for quantised blocks, which safetensors has not.
    #[must_use]
    pub fn safetensors(self) -> Option<safetensors::Dtype> {
        match self {
            Self::Float(DType::F32) => Some(safetensors::Dtype::F32),
            Self::Float(DType::F16) => Some(safetensors::Dtype::F16),
            Self::Float(DType::BF16) => Some(safetensors::Dtype::BF16),
            Self::F64 => Some(safetensors::Dtype::F64),
            Self::Other(dtype) => Some(dtype),
            Self::Ggml(_) => None,
        }
    }

    /// From the dtype of a safetensors header.
    #[must_use]
    pub fn from_safetensors(dtype: safetensors::Dtype) -> Self {
        match dtype {
            safetensors::Dtype::F32 => Self::Float(DType::F32),
            safetensors::Dtype::F16 => Self::Float(DType::F16),
            safetensors::Dtype::BF16 => Self::Float(DType::BF16),
            safetensors::Dtype::F64 => Self::F64,
            other => Self::Other(other),
        }
    }
}

impl fmt::Display for StoredType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Float(DType::F32) => f.write_str("F32"),
            Self::Float(DType::F16) => f.write_str("F16"),
            Self::Float(DType::BF16) => f.write_str("BF16"),
            Self::F64 => f.write_str("F64"),
            Self::Other(dtype) => write!(f, "{dtype:?}"),
            Self::Ggml(dtype) => write!(f, "{dtype:?}"),
        }
    }
}

/// Where the values of a tensor stand within a stored one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// Shape of the stored tensor.
    pub stored_shape: Vec<usize>,
    /// Where the stored tensor begins in its file.
    pub(crate) start: u64,
    /// The place of its first value there.
    pub(crate) first: usize,
    /// Its values as blocks of rows: number of blocks, of rows in a block, of values in a row.
    pub(crate) dims: [usize; 3],
    /// From one block, row, value to the next, in values.
    pub(crate) strides: [usize; 3],
}

/// A tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name in a Hugging Face checkpoint (of a GGUF file: after translation).
    pub name: String,
    /// Its shape, outermost first.
    pub shape: Vec<usize>,
    /// How its values are stored.
    pub dtype: StoredType,
    /// Bytes it takes in its file. Of the tensors that share a stored one, each has a share of its bytes, in their order.
    pub bytes: u64,
    /// Index of its file in [`crate::Checkpoint::shards`].
    pub shard: usize,
    /// Where its bytes begin in that file.
    pub offset: u64,
    /// Whether those bytes, as they stand, are the values in row-major order (not so where a GGUF file has permuted rows).
    pub verbatim: bool,
    /// Where its values are, if not in `bytes` in row-major order.
    pub view: Option<View>,
}

impl TensorInfo {
    /// Number of values. Checked when the checkpoint was opened, so it does not overflow.
    #[must_use]
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Its share of the stored tensor's bytes as a tensor: other values than its own where it has a view.
    #[must_use]
    pub fn as_stored(&self) -> Self {
        Self { view: None, ..self.clone() }
    }

    /// Whether it has no values.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }
}

/// The type that holds most bytes of matrices; for quantised ones, what they become.
pub(crate) fn prevailing_type(tensors: &[TensorInfo]) -> StoredType {
    let bytes = |stored: StoredType| -> u64 {
        let same = |tensor: &&TensorInfo| match tensor.dtype {
            StoredType::Ggml(_) => stored == StoredType::Float(DType::BF16),
            own => own == stored,
        };
        tensors.iter().filter(|tensor| tensor.shape.len() == 2).filter(same).map(|tensor| tensor.bytes).sum()
    };
    let floats = [DType::BF16, DType::F16, DType::F32].map(StoredType::Float);
    let all = [StoredType::F64].into_iter().chain(floats);
    all.max_by_key(|stored| bytes(*stored)).unwrap_or(StoredType::Float(DType::BF16))
}

/// The dtype that most of the matrices are computed in.
pub(crate) fn prevailing_dtype(tensors: &[TensorInfo]) -> DType {
    prevailing_type(tensors).computed().unwrap_or(DType::BF16)
}
