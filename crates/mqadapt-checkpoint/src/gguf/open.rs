//! Opens a GGUF file as a Hugging Face checkpoint: configuration and tensors under the names they have there.

use std::collections::{HashMap, HashSet};

use mqadapt_core::{DType, ModelConfig};

use super::architecture::{self, Architecture};
use super::config::model_config;
use super::described::Tables;
use super::ggml_type::GgmlType;
use super::header::{GgufTensor, Header};
use super::metadata::Metadata;
use super::names::{Form, Meaning, gguf_name};
use super::problem::{Parsed, Problem};
use super::read::Reader;
use super::source::Source;
use crate::tensor::prevailing_dtype;
use crate::{StoredType, TensorInfo, naming};

/// A file whose header, metadata and tensors agree with each other.
#[derive(Debug)]
pub(super) struct Model {
    pub metadata: Metadata,
    pub architecture: &'static Architecture,
    pub config: ModelConfig,
    /// In the order of the file, shard 0.
    pub tensors: Vec<TensorInfo>,
}

impl Model {
    pub(super) fn read(source: &dyn Source) -> Parsed<Self> {
        let header = Header::read(source)?;
        let architecture = architecture::of(&header.metadata)?;
        let stored = hugging_face_tensors(&header.tensors, architecture)?;
        let tables = tables(source, &header)?;
        let whole: Vec<TensorInfo> = stored.iter().map(|stored| stored.info.clone()).collect();
        let config = model_config(&header, architecture, &tables, prevailing_dtype(&whole))?;
        let stored = split(stored, &config)?;
        compare(&stored, &config, architecture)?;
        let tensors = stored.into_iter().map(|stored| stored.info).collect();
        Ok(Self { metadata: header.metadata, architecture, config, tensors })
    }
}

/// A tensor that carries weights, beside what it is in the file.
struct Stored<'a> {
    /// Under the first of its Hugging Face names until it is split.
    info: TensorInfo,
    meaning: Meaning,
    name: &'a str,
}

/// The file's tensors under their Hugging Face names.
fn hugging_face_tensors<'a>(stored: &'a [GgufTensor], architecture: &Architecture) -> Parsed<Vec<Stored<'a>>> {
    let mut out = Vec::new();
    for tensor in stored {
        let meaning = Meaning::parse(architecture, &tensor.name).ok_or_else(|| {
            let detail = format!("is not part of a model of architecture '{}'", architecture.name);
            Problem::tensor(&tensor.name, detail)
        })?;
        let Some(name) = meaning.names().into_iter().next() else { continue };
        let form = Form::of(architecture, &name);
        if form.permuted && tensor.shape.len() == 1 && tensor.ty.is_quantised() {
            return Err(Problem::tensor(&tensor.name, format!("is a bias of type {}; expected F32", tensor.ty.name())));
        }
        let info = TensorInfo {
            name,
            shape: tensor.shape.clone(),
            dtype: tensor.ty.stored_type(),
            bytes: tensor.bytes,
            shard: 0,
            offset: tensor.offset,
            verbatim: !tensor.ty.is_quantised() && form.is_plain(),
            view: None,
        };
        out.push(Stored { info, meaning, name: &tensor.name });
    }
    Ok(out)
}

/// Splits tensors that hold the rows of several modules (Phi-3's `attn_qkv`): rows are whole blocks, so each part is a range
/// of bytes.
fn split<'a>(stored: Vec<Stored<'a>>, config: &ModelConfig) -> Parsed<Vec<Stored<'a>>> {
    let mut out = Vec::with_capacity(stored.len());
    for whole in stored {
        let Stored { info, meaning, name } = &whole;
        match *meaning {
            Meaning::Layer { layer_idx, modules, bias } if modules.len() > 1 => {
                let parts = naming::parts(config, layer_idx, modules, bias, info);
                let detail = || format!("has shape {:?}, which is not that of the layer in the metadata", info.shape);
                let parts = parts.ok_or_else(|| Problem::tensor(name, detail()))?;
                out.extend(parts.into_iter().map(|info| Stored { info, meaning: *meaning, name }));
            }
            _ => out.push(whole),
        }
    }
    Ok(out)
}

const NO_SUCH_LAYER: &str = "does not fit the metadata, which says that the model has no such layer or bias";

/// Every tensor that the configuration expects must be there with its shape, and no other.
fn compare(stored: &[Stored], config: &ModelConfig, architecture: &Architecture) -> Parsed<()> {
    let expected = config.tensors();
    let shapes: HashMap<&str, &[usize]> =
        expected.iter().map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice())).collect();
    for Stored { info, name, .. } in stored {
        match shapes.get(info.name.as_str()) {
            Some(shape) if *shape == info.shape => {}
            Some(shape) => {
                let detail = format!("has shape {:?}, but the metadata says {shape:?}", info.shape);
                return Err(Problem::tensor(name, detail));
            }
            None => return Err(Problem::tensor(name, NO_SUCH_LAYER)),
        }
    }
    let found: HashSet<&str> = stored.iter().map(|stored| stored.info.name.as_str()).collect();
    match expected.iter().find(|tensor| !found.contains(tensor.name.as_str())) {
        Some(absent) => Err(Problem::tensor(&gguf_name(architecture, &absent.name), "is missing")),
        None => Ok(()),
    }
}

fn tables(source: &dyn Source, header: &Header) -> Parsed<Tables> {
    let read = |name: &str| header.tensor(name).map(|tensor| rope_factors(source, tensor)).transpose();
    Ok(Tables {
        divisors: read("rope_freqs.weight")?,
        short: read("rope_factors_short.weight")?,
        long: read("rope_factors_long.weight")?,
    })
}

fn rope_factors(source: &dyn Source, tensor: &GgufTensor) -> Parsed<Vec<f32>> {
    let count: usize = tensor.shape.iter().product();
    if count > 1 << 16 || tensor.ty != GgmlType::F32 {
        return Err(Problem::tensor(&tensor.name, "is not a list of F32 factors, one per frequency"));
    }
    let mut bytes = vec![0; 4 * count];
    let reader = Reader { source, ty: tensor.ty, offset: tensor.offset, dtype: DType::F32, plus_one: false };
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
