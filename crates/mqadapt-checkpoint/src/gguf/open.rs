//! Opens a GGUF file as a Hugging Face checkpoint: configuration and tensors under the names they have there.

use std::collections::{HashMap, HashSet};

use mqadapt_core::{DType, ModelConfig};

use super::config::{model_config, refuse_other_models};
use super::ggml_type::GgmlType;
use super::header::{GgufTensor, Header};
use super::metadata::Metadata;
use super::names::{Meaning, gguf_name};
use super::problem::{Parsed, Problem};
use super::read::Reader;
use super::source::Source;
use crate::tensor::prevailing_dtype;
use crate::{StoredType, TensorInfo};

/// A file whose header, metadata and tensors agree with each other.
#[derive(Debug)]
pub(super) struct Model {
    pub metadata: Metadata,
    pub config: ModelConfig,
    /// In the order of the file, shard 0.
    pub tensors: Vec<TensorInfo>,
}

impl Model {
    pub(super) fn read(source: &dyn Source) -> Parsed<Self> {
        let header = Header::read(source)?;
        refuse_other_models(&header.metadata)?;
        let (tensors, stored_names) = hugging_face_tensors(&header.tensors)?;
        let factors = header.tensor("rope_freqs.weight").map(|tensor| rope_factors(source, tensor)).transpose()?;
        let config = model_config(&header, factors.as_deref(), prevailing_dtype(&tensors))?;
        compare(&tensors, &stored_names, &config)?;
        Ok(Self { metadata: header.metadata, config, tensors })
    }
}

/// The file's tensors under their Hugging Face names, and beside each its name in the file.
fn hugging_face_tensors(stored: &[GgufTensor]) -> Parsed<(Vec<TensorInfo>, Vec<&str>)> {
    let mut tensors = Vec::new();
    let mut stored_names = Vec::new();
    for tensor in stored {
        let meaning = Meaning::parse(&tensor.name)
            .ok_or_else(|| Problem::tensor(&tensor.name, "is not part of a model of architecture 'llama'"))?;
        let Some(name) = meaning.name() else { continue };
        if meaning.is_permuted() && tensor.shape.len() == 1 && tensor.ty.is_quantised() {
            return Err(Problem::tensor(&tensor.name, format!("is a bias of type {}; expected F32", tensor.ty.name())));
        }
        stored_names.push(tensor.name.as_str());
        tensors.push(TensorInfo {
            name,
            shape: tensor.shape.clone(),
            dtype: tensor.ty.stored_type(),
            bytes: tensor.bytes,
            shard: 0,
            offset: tensor.offset,
            verbatim: !tensor.ty.is_quantised() && !meaning.is_permuted(),
        });
    }
    Ok((tensors, stored_names))
}

/// Every tensor that the configuration expects must be there with its shape, and no other.
fn compare(tensors: &[TensorInfo], stored_names: &[&str], config: &ModelConfig) -> Parsed<()> {
    let expected = config.tensors();
    let shapes: HashMap<&str, &[usize]> =
        expected.iter().map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice())).collect();
    for (tensor, stored_name) in tensors.iter().zip(stored_names) {
        match shapes.get(tensor.name.as_str()) {
            Some(shape) if *shape == tensor.shape => {}
            Some(shape) => {
                let detail = format!("has shape {:?}, but the metadata says {shape:?}", tensor.shape);
                return Err(Problem::tensor(stored_name, detail));
            }
            None => {
                let detail = "does not fit the metadata, which says that the model has no such layer or bias";
                return Err(Problem::tensor(stored_name, detail));
            }
        }
    }
    let found: HashSet<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    match expected.iter().find(|tensor| !found.contains(tensor.name.as_str())) {
        Some(absent) => Err(Problem::tensor(&gguf_name(&absent.name), "is missing")),
        None => Ok(()),
    }
}

fn rope_factors(source: &dyn Source, tensor: &GgufTensor) -> Parsed<Vec<f32>> {
    let count: usize = tensor.shape.iter().product();
    if count > 1 << 16 || tensor.ty != GgmlType::F32 {
        return Err(Problem::tensor(&tensor.name, "is not a list of F32 factors, one per frequency"));
    }
    let mut bytes = vec![0; 4 * count];
    let reader = Reader { source, ty: tensor.ty, offset: tensor.offset, dtype: DType::F32 };
    reader.read(0, &mut bytes)?;
    Ok(bytes.as_chunks().0.iter().map(|&value| f32::from_le_bytes(value)).collect())
}

impl GgmlType {
    /// As the crate names it.
    fn stored_type(self) -> StoredType {
        use candle_core::quantized::GgmlDType;
        match self {
            Self::F32 => StoredType::Float(DType::F32),
            Self::F16 => StoredType::Float(DType::F16),
            Self::Bf16 => StoredType::Float(DType::BF16),
            Self::Q4_0 => StoredType::Ggml(GgmlDType::Q4_0),
            Self::Q4_1 => StoredType::Ggml(GgmlDType::Q4_1),
            Self::Q5_0 => StoredType::Ggml(GgmlDType::Q5_0),
            Self::Q5_1 => StoredType::Ggml(GgmlDType::Q5_1),
            Self::Q8_0 => StoredType::Ggml(GgmlDType::Q8_0),
            Self::Q4K => StoredType::Ggml(GgmlDType::Q4K),
            Self::Q5K => StoredType::Ggml(GgmlDType::Q5K),
            Self::Q6K => StoredType::Ggml(GgmlDType::Q6K),
        }
    }

    /// The other way; `None` for a type that no GGUF tensor here has.
    pub(super) fn of(stored: StoredType) -> Option<Self> {
        Self::ALL.into_iter().find(|ty| ty.stored_type() == stored)
    }
}
