//! A checkpoint that has been opened and checked.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mqadapt_core::{DType, ModelConfig};
use xxhash_rust::xxh3::Xxh3;

use crate::cast::{convert_stored, first_not_finite};
use crate::contents::Contents;
use crate::gguf::{self, Gguf};
use crate::naming::by_name;
use crate::tensor::prevailing_type;
use crate::{Error, Result, Shard, ShardHead, ShardSource, SideFile, StoredType, TensorInfo, View, folder, side_files};

/// Bytes read at a time where values are converted while they are read.
const PIECE: usize = 64 << 10;
/// The same where they are gathered from all over a tensor.
const VIEW_PIECE: usize = 1 << 20;

/// A checkpoint: a folder in Hugging Face layout, or a GGUF file.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    contents: Contents,
    by_name: HashMap<String, usize>,
    stored: StoredType,
    gguf: Option<Gguf>,
}

impl Checkpoint {
    /// Opens and checks a checkpoint: configuration, headers and index, and that every tensor of the model is there with
    /// its shape and a float type. Reads no weights.
    ///
    /// # Errors
    /// The [`Error`] that applies; each says what to do.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.exists() {
            let detail = "no such file or folder".to_owned();
            return Err(Error::NotACheckpoint { path: path.to_owned(), detail });
        }
        let (contents, gguf) = if path.is_dir() {
            (folder::open(path)?, None)
        } else {
            let (contents, gguf) = gguf::open(path)?;
            (contents, Some(gguf))
        };
        Ok(Self::new(path, contents, gguf))
    }

    /// Opens a checkpoint whose shards are fetched one by one. `folder` has `config.json`, the index of a sharded checkpoint, and
    /// the side files; `heads` has every shard. Checks what [`Self::open`] checks. Reading a tensor fetches its shard from
    /// `source`, which keeps it until [`Shard::release`].
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn open_remote(folder: &Path, heads: Vec<ShardHead>, source: &Arc<dyn ShardSource>) -> Result<Self> {
        Ok(Self::new(folder, folder::open_remote(folder, heads, source)?, None))
    }

    fn new(path: &Path, contents: Contents, gguf: Option<Gguf>) -> Self {
        let by_name = by_name(&contents.config, &contents.tensors);
        let stored = prevailing_type(&contents.tensors);
        Self { path: path.to_owned(), contents, by_name, stored, gguf }
    }

    /// Where it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its configuration.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        &self.contents.config
    }

    /// The dtype that its weights are converted to or computed with unless another is asked for: the one that most of its
    /// matrices are stored in; `BF16` for quantised ones, `F32` for 64-bit ones.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.stored.computed().unwrap_or(DType::BF16)
    }

    /// The name of the dtype that its weights have when they are converted without another being asked for.
    #[must_use]
    pub fn stored_dtype(&self) -> &'static str {
        self.stored.name().unwrap_or(DType::BF16.name())
    }

    /// Its tensors, in source order: shard by shard, by offset.
    #[must_use]
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.contents.tensors
    }

    /// The tensor of this name; for the embedding of a tied pair of which only `lm_head.weight` is stored, that one.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).and_then(|&at| self.contents.tensors.get(at))
    }

    /// The files that hold its tensors.
    #[must_use]
    pub fn shards(&self) -> &[Shard] {
        &self.contents.shards
    }

    /// Reads values as f32 (exact, but for 64-bit ones), from value `first_value` of the row-major tensor on, filling `out`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`], [`Error::Dtype`] for tensors that are not floats, [`Error::Io`], [`Error::Shrunk`].
    pub fn read_f32(&self, tensor: &TensorInfo, first_value: usize, out: &mut [f32]) -> Result<()> {
        let bytes = bytemuck::cast_slice_mut(out);
        self.read_as(tensor, DType::F32, first_value, bytes)?;
        #[cfg(target_endian = "big")]
        out.iter_mut().for_each(|value| *value = f32::from_bits(value.to_bits().swap_bytes()));
        Ok(())
    }

    /// As [`Self::read_f32`], for whatever is computed with the values: refuses those that are not finite.
    ///
    /// # Errors
    /// As [`Self::read_f32`]; [`Error::NotFinite`].
    pub fn read_finite(&self, tensor: &TensorInfo, first_value: usize, out: &mut [f32]) -> Result<()> {
        self.read_f32(tensor, first_value, out)?;
        match first_not_finite(out) {
            None => Ok(()),
            Some(at) => Err(self.not_finite(tensor, first_value + at, out.get(at).copied().unwrap_or(f32::NAN))),
        }
    }

    /// The error for a value of a tensor that is not finite.
    #[must_use]
    pub fn not_finite(&self, tensor: &TensorInfo, mut index: usize, value: f32) -> Error {
        let mut at = Vec::with_capacity(tensor.shape.len());
        for size in tensor.shape.iter().rev() {
            at.push(index % size.max(&1));
            index /= size.max(&1);
        }
        at.reverse();
        let path = self.shards().get(tensor.shard).map_or(self.path(), Shard::path).to_owned();
        Error::NotFinite { path, name: tensor.name.clone(), value, at }
    }

    /// Reads values in another dtype as little-endian bytes, from value `first_value` of the row-major tensor on, filling
    /// `out` (a whole number of values). In the stored dtype this is a plain `pread` into `out`. Each value is rounded
    /// once, ties to even. Returns how many finite values became infinite (`F16` ends at 65,504).
    ///
    /// # Errors
    /// As [`Self::read_f32`].
    pub fn read_as(&self, tensor: &TensorInfo, dtype: DType, first_value: usize, out: &mut [u8]) -> Result<u64> {
        let count = out.len() / dtype.bytes();
        if first_value.checked_add(count).is_none_or(|end| end > tensor.len()) {
            let (name, len) = (tensor.name.clone(), tensor.len() as u64);
            return Err(Error::OutOfRange { name, len, first: first_value, count });
        }
        let shard = self.contents.shards.get(tensor.shard);
        if let (Some(gguf), Some(shard)) = (&self.gguf, shard)
            && !tensor.verbatim
        {
            return gguf.read_as(shard, tensor, dtype, first_value, out);
        }
        let (Some(shard), Some(width)) = (shard, tensor.dtype.value_bytes()) else {
            let (path, name) = (self.path.clone(), tensor.name.clone());
            return Err(Error::Dtype { path, name, found: tensor.dtype.to_string() });
        };
        if let Some(view) = &tensor.view {
            return read_view(shard, tensor, view, dtype, first_value, out);
        }
        let mut offset = tensor.offset + (first_value * width) as u64;
        if tensor.dtype == StoredType::Float(dtype) {
            shard.read_exact_at(offset, out)?;
            return Ok(0);
        }
        let values = (PIECE / width).min(count); // in a piece
        let mut piece = vec![0; values * width];
        let mut overflowed = 0;
        for out in out.chunks_mut((values * dtype.bytes()).max(1)) {
            let piece = &mut piece[..out.len() / dtype.bytes() * width];
            shard.read_exact_at(offset, piece)?;
            overflowed += convert_stored(tensor.dtype, piece, dtype, out);
            offset += piece.len() as u64;
        }
        Ok(overflowed)
    }

    /// Reads values as they are stored, of types that have no [`DType`] too, from value `first_value` of the row-major tensor on.
    ///
    /// # Errors
    /// As [`Self::read_f32`], but for the dtype: a tensor whose values are not stored one by one is read by bytes.
    pub fn read_stored(&self, tensor: &TensorInfo, first_value: usize, out: &mut [u8]) -> Result<()> {
        let Some(shard) = self.contents.shards.get(tensor.shard) else { return Ok(()) };
        let width = tensor.dtype.value_bytes().unwrap_or(1);
        match &tensor.view {
            Some(view) => view.read(shard, width, first_value, out),
            None => shard.read_exact_at(tensor.offset + (first_value * width) as u64, out),
        }
    }

    /// What else is in the folder and goes along when it is converted: tokenizer, chat template, generation
    /// configuration, licence. Of a GGUF file: what its metadata says of them.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Gguf`] for a tokenizer that is not supported.
    pub fn side_files(&self) -> Result<Vec<SideFile>> {
        match &self.gguf {
            Some(gguf) => gguf.side_files(&self.path),
            None => side_files::of_folder(&self.path),
        }
    }

    /// A name for the weights and the configuration: equal for copies wherever they lie, different when either changes.
    ///
    /// A hash (XXH3, 128 bits) of the configuration, of every tensor's name, shape, type and place, and of the first and
    /// last 512 bytes of every tensor. It costs milliseconds and does not see a change in the middle of a large tensor:
    /// the manifest's checksums do. Remote shards are fetched, unless [`Self::sample_shard`] has seen them.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Shrunk`].
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = Xxh3::new();
        hash.update(self.identity().as_bytes());
        for number in 0..self.shards().len() {
            hash.update(self.sample_shard(number)?.as_bytes());
        }
        Ok(format!("xxh3-128:{:032x}", hash.digest128()))
    }

    /// A hash of the configuration and of every tensor's name, shape, type and place; no weights are read.
    #[must_use]
    pub fn identity(&self) -> String {
        let mut hash = Xxh3::new();
        hash.update(self.config().json.to_string().as_bytes());
        for tensor in self.tensors() {
            let TensorInfo { shape, dtype, offset, shard, .. } = tensor;
            let name = self.config().stored_name(&tensor.name);
            hash.update(format!("\n{name} {shape:?} {dtype} {offset}@{shard}").as_bytes());
        }
        format!("{:032x}", hash.digest128())
    }

    /// A shard's part of the [`Self::fingerprint`]; remembered.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Shrunk`].
    pub fn sample_shard(&self, number: usize) -> Result<&str> {
        let Some(shard) = self.shards().get(number) else { return Ok("") };
        shard.sample(self.tensors().iter().filter(|tensor| tensor.shard == number))
    }

    /// Tells what [`Self::sample_shard`] gave in an earlier process, so that a remote shard need not be fetched again.
    pub fn remember_sample(&self, number: usize, sample: &str) {
        if let Some(shard) = self.shards().get(number) {
            shard.remember_sample(sample);
        }
    }
}

/// [`Checkpoint::read_as`] of a tensor with a view.
fn read_view(
    shard: &Shard,
    tensor: &TensorInfo,
    view: &View,
    dtype: DType,
    mut first_value: usize,
    out: &mut [u8],
) -> Result<u64> {
    let width = tensor.dtype.value_bytes().unwrap_or(1);
    if tensor.dtype == StoredType::Float(dtype) {
        view.read(shard, width, first_value, out)?;
        return Ok(0);
    }
    let values = (VIEW_PIECE / width).min(out.len() / dtype.bytes()); // in a piece
    let mut piece = vec![0; values * width];
    let mut overflowed = 0;
    for out in out.chunks_mut((values * dtype.bytes()).max(1)) {
        let piece = &mut piece[..out.len() / dtype.bytes() * width];
        view.read(shard, width, first_value, piece)?;
        overflowed += convert_stored(tensor.dtype, piece, dtype, out);
        first_value += out.len() / dtype.bytes();
    }
    Ok(overflowed)
}

/// The configuration of a checkpoint. Of a folder, nothing but its `config.json` needs to be there.
///
/// # Errors
/// As [`Checkpoint::open`].
pub fn read_config(path: &Path) -> Result<ModelConfig> {
    if path.is_dir() { folder::read_config(path) } else { Ok(Checkpoint::open(path)?.contents.config) }
}

#[cfg(test)]
mod tests;
