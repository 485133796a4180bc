//! GGUF files, read as the Hugging Face checkpoint that they were made from.
//!
//! In: any bytes. Out: a configuration, tensors under their Hugging Face names in the Hugging Face row order, and the files
//! that belong to a tokenizer; or an error that names the place in the file. `docs/gguf.md` has the details.

mod architecture;
mod config;
mod dequantize;
mod described;
mod ggml_type;
mod header;
mod metadata;
mod names;
mod open;
mod problem;
mod read;
mod rope;
mod source;
mod tokenizer;

#[cfg(test)]
mod architecture_tests;
#[cfg(test)]
mod test_writer;
#[cfg(test)]
mod tests;

use std::path::Path;

use mqadapt_core::{DType, ModelConfig};

use crate::contents::Contents;
use crate::{Error, Result, Shard, SideFile, TensorInfo, file};
use architecture::Architecture;
use ggml_type::GgmlType;
use metadata::{Metadata, ModelKeys};
use names::Form;
use open::Model;
use source::Source;

/// `model_type` of the families of which GGUF files are read.
pub fn gguf_model_types() -> impl Iterator<Item = &'static str> {
    architecture::ARCHITECTURES.iter().map(|architecture| architecture.model_type)
}

/// What is kept of an open file beside its [`Contents`].
#[derive(Debug)]
pub(crate) struct Gguf {
    metadata: Metadata,
    architecture: &'static Architecture,
    head_dim: usize,
}

/// Opens a file: one shard.
pub(crate) fn open(path: &Path) -> Result<(Contents, Gguf)> {
    let (file, len) = file::open_regular(path)?;
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let shard = Shard::opened(name, path.to_owned(), len, file, None);
    let model = Model::read(&shard).map_err(|problem| problem.in_file(path))?;
    let (gguf, config, tensors) = Gguf::keep(model);
    Ok((Contents { config, shards: vec![shard], tensors }, gguf))
}

impl Gguf {
    fn keep(model: Model) -> (Self, ModelConfig, Vec<TensorInfo>) {
        let Model { metadata, architecture, config, tensors } = model;
        (Self { metadata, architecture, head_dim: config.head_dim }, config, tensors)
    }

    /// Values from `first_value` on, in the Hugging Face order, rounded once; the caller has checked the range.
    /// Returns how many finite values became infinite.
    pub(crate) fn read_as(
        &self,
        source: &dyn Source,
        tensor: &TensorInfo,
        dtype: DType,
        first_value: usize,
        out: &mut [u8],
    ) -> Result<u64> {
        let ty = GgmlType::of(tensor.dtype).ok_or_else(|| Error::Dtype {
            path: "GGUF".into(),
            name: tensor.name.clone(),
            found: tensor.dtype.to_string(),
        })?;
        let form = Form::of(self.architecture, &tensor.name);
        let reader = read::Reader { source, ty, offset: tensor.offset, dtype, plus_one: form.plus_one };
        let permuted = form.permuted.then_some(self.head_dim);
        read::read_as(&reader, tensor, permuted, first_value, out)
    }

    /// Tokenizer, chat template and generation configuration, made from the metadata.
    pub(crate) fn side_files(&self, path: &Path) -> Result<Vec<SideFile>> {
        let keys = ModelKeys { metadata: &self.metadata, architecture: self.architecture.name };
        tokenizer::side_files(keys).map_err(|problem| problem.in_file(path))
    }
}

/// Parses bytes that may be anything, and reads a few values of every tensor: the body of the fuzz target.
///
/// # Errors
/// The [`Error`] that opening such a file would give.
#[doc(hidden)]
pub fn check_gguf_bytes(bytes: &[u8]) -> Result<()> {
    let path = Path::new("memory");
    let source: &dyn Source = &bytes;
    let model = Model::read(source).map_err(|problem| problem.in_file(path))?;
    let (gguf, _, tensors) = Gguf::keep(model);
    for tensor in &tensors {
        let first = tensor.len() / 3;
        let mut out = vec![0; 2 * (tensor.len() - first).min(1000)];
        gguf.read_as(source, tensor, DType::BF16, first, &mut out)?;
    }
    gguf.side_files(path)?;
    Ok(())
}
