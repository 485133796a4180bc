//! A checkpoint that has been opened and checked.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use mqadapt_core::{DType, ModelConfig};
use xxhash_rust::xxh3::Xxh3;

use crate::file::read_exact_at;
use crate::gguf::{self, Gguf};
use crate::numbers::convert;
use crate::{Error, Result, SideFile, StoredType, TensorInfo, folder, side_files};

/// Bytes read at a time where values are converted while they are read.
const PIECE: usize = 64 << 10;
/// Bytes of each tensor, at its beginning and at its end, that go into the fingerprint.
const SAMPLE: u64 = 512;

/// A checkpoint: a folder in Hugging Face layout, or a GGUF file.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    contents: Contents,
    by_name: HashMap<String, usize>,
    dtype: DType,
    gguf: Option<Gguf>,
}

/// What opening any kind of checkpoint finds.
#[derive(Debug)]
pub(crate) struct Contents {
    pub config: ModelConfig,
    pub shards: Vec<Shard>,
    pub tensors: Vec<TensorInfo>,
}

/// A file that holds tensors.
#[derive(Debug)]
pub struct Shard {
    name: String,
    path: PathBuf,
    len: u64,
    file: Arc<File>,
    modified: Option<SystemTime>,
    metadata: Option<Vec<(String, String)>>,
}

impl Shard {
    pub(crate) fn opened(
        name: String,
        path: PathBuf,
        len: u64,
        file: File,
        metadata: Option<Vec<(String, String)>>,
    ) -> Self {
        let modified = file.metadata().and_then(|m| m.modified()).ok();
        Self { name, path, len, file: Arc::new(file), modified, metadata }
    }

    /// Its file name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// When it was last changed, at the time it was opened.
    #[must_use]
    pub fn modified(&self) -> Option<SystemTime> {
        self.modified
    }

    /// What is different about the file from when it was opened, in words; `None` if nothing is.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn change(&self) -> Result<Option<String>> {
        let metadata = std::fs::metadata(&self.path).map_err(Error::io("check", &self.path))?;
        if metadata.len() != self.len {
            return Ok(Some(format!("it had {} bytes and has {} now", self.len, metadata.len())));
        }
        Ok((metadata.modified().ok() != self.modified).then(|| "it was written to".to_owned()))
    }

    /// `__metadata__` of its header, in the file's order.
    #[must_use]
    pub fn metadata(&self) -> Option<&[(String, String)]> {
        self.metadata.as_deref()
    }

    /// The file, open for reading.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn file(&self) -> Result<Arc<File>> {
        Ok(Arc::clone(&self.file))
    }

    /// Fills `out` with the file's bytes from `offset` on.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Shrunk`].
    pub fn read_exact_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        read_exact_at(&*self.file()?, &self.path, offset, out)
    }
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
        let by_name = contents.tensors.iter().enumerate().map(|(at, tensor)| (tensor.name.clone(), at)).collect();
        let dtype = prevailing_dtype(&contents.tensors);
        Ok(Self { path: path.to_owned(), contents, by_name, dtype, gguf })
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
    /// matrices are stored in; `BF16` for quantised ones.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Its tensors, in source order: shard by shard, by offset.
    #[must_use]
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.contents.tensors
    }

    /// The tensor of this name.
    #[must_use]
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).and_then(|&at| self.contents.tensors.get(at))
    }

    /// The files that hold its tensors.
    #[must_use]
    pub fn shards(&self) -> &[Shard] {
        &self.contents.shards
    }

    /// Reads values as f32 (exact), from value `first_value` of the row-major tensor on, filling `out`.
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
        let (Some(shard), Some(stored)) = (shard, tensor.dtype.float()) else {
            let (path, name) = (self.path.clone(), tensor.name.clone());
            return Err(Error::Dtype { path, name, found: tensor.dtype.to_string() });
        };
        let mut offset = tensor.offset + (first_value * stored.bytes()) as u64;
        if stored == dtype {
            shard.read_exact_at(offset, out)?;
            return Ok(0);
        }
        let values = (PIECE / stored.bytes()).min(count); // in a piece
        let mut piece = vec![0; values * stored.bytes()];
        let mut overflowed = 0;
        for out in out.chunks_mut((values * dtype.bytes()).max(1)) {
            let piece = &mut piece[..out.len() / dtype.bytes() * stored.bytes()];
            shard.read_exact_at(offset, piece)?;
            overflowed += convert(stored, piece, dtype, out);
            offset += piece.len() as u64;
        }
        Ok(overflowed)
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
    /// the manifest's checksums do.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Shrunk`].
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = Xxh3::new();
        hash.update(self.config().json.to_string().as_bytes());
        let mut sample = [0; 2 * SAMPLE as usize];
        for tensor in self.tensors() {
            let line =
                format!("\n{} {:?} {} {}@{} ", tensor.name, tensor.shape, tensor.dtype, tensor.offset, tensor.shard);
            hash.update(line.as_bytes());
            let Some(shard) = self.contents.shards.get(tensor.shard) else { continue };
            let (first, last) = sample.split_at_mut(tensor.bytes.min(SAMPLE) as usize);
            shard.read_exact_at(tensor.offset, first)?;
            let last = &mut last[..tensor.bytes.saturating_sub(SAMPLE).min(SAMPLE) as usize];
            shard.read_exact_at(tensor.offset + tensor.bytes - last.len() as u64, last)?;
            let read = first.len() + last.len();
            hash.update(&sample[..read]);
        }
        Ok(format!("xxh3-128:{:032x}", hash.digest128()))
    }
}

/// The configuration of a checkpoint. Of a folder, nothing but its `config.json` needs to be there.
///
/// # Errors
/// As [`Checkpoint::open`].
pub fn read_config(path: &Path) -> Result<ModelConfig> {
    if path.is_dir() { folder::read_config(path) } else { Ok(Checkpoint::open(path)?.contents.config) }
}

/// The dtype that holds most bytes of matrices.
pub(crate) fn prevailing_dtype(tensors: &[TensorInfo]) -> DType {
    let bytes = |dtype: DType| -> u64 {
        let stored = |tensor: &&TensorInfo| match tensor.dtype {
            StoredType::Float(own) => own == dtype,
            StoredType::Ggml(_) => dtype == DType::BF16,
            StoredType::Other(_) => false,
        };
        tensors.iter().filter(|tensor| tensor.shape.len() == 2).filter(stored).map(|tensor| tensor.bytes).sum()
    };
    [DType::BF16, DType::F16, DType::F32].into_iter().max_by_key(|dtype| bytes(*dtype)).unwrap_or(DType::BF16)
}

#[cfg(test)]
mod tests;
