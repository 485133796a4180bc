//! A checkpoint's layers one after the other over a few sequences: the weights of one layer and the activations of one
//! sequence at a time. In: a checkpoint of any size and token ids. Out: what every layer saw of them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;
use std::sync::Arc;

use mqadapt_checkpoint::{Checkpoint, StoredType, first_not_finite, not_finite};
use mqadapt_compress::LayerWeights;
use mqadapt_core::family::{EMBED_POSITIONS, EMBED_TOKENS, LayerTensor, Module};
use mqadapt_core::{CacheStorage, DType, LayerCache, ModelConfig, Progress, Progressing};
use mqadapt_kernels::Precision;

use crate::backend::{Backend, Head, HostMatrix, Kernels, Norm};
use crate::decoder::Decoder;
use crate::load::activations::Activations;
use crate::load::overlay;
use crate::load::storage::Floats;
use crate::load::weights::{self, Weights};
use crate::run::hidden_states::{HiddenStates, LayerTrace};
use crate::run::session::Runner;
use crate::run::trace::Visitor;
use crate::{Error, Result, WeightFormat};

/// The residual stream entering the first layer, in a file of `folder` where there is one. Reads only the rows of the embedding that the sequences need.
/// The sequences are those of a calibration: none is longer than the original context, whose frequencies
/// [`mqadapt_core::AttentionShape::inv_freq`] has.
///
/// # Errors
/// [`Error::NotRunnable`], [`Error::Token`], [`Error::Context`], [`Error::CalibrationContext`], [`Error::Missing`], [`Error::Checkpoint`].
pub fn embed(checkpoint: &Checkpoint, sequences: &[Vec<u32>], folder: Option<&Path>) -> Result<Activations> {
    let config = checkpoint.config();
    weights::refuse_not_runnable(config)?;
    let (width, vocab_size) = (config.hidden_size, config.vocab_size);
    let table = checkpoint.tensor(EMBED_TOKENS).ok_or_else(|| Error::Missing { tensor: EMBED_TOKENS.to_owned() })?;
    let scale = weights::embedding_scale(config, table.dtype.computed().unwrap_or(checkpoint.dtype()));
    let mut rows: HashMap<u32, Vec<f32>> = HashMap::new();
    let mut out = Activations::new(sequences.iter().map(Vec::len).collect(), width, folder)?;
    let (learned, original) = (config.learned_positions(), config.original_context());
    let positions = checkpoint.tensor(EMBED_POSITIONS).filter(|_| learned.is_some());
    for (sequence, ids) in sequences.iter().enumerate() {
        let found = ids.len();
        if let Some(limit) = learned.filter(|limit| found > *limit) {
            return Err(Error::Context { limit, found });
        }
        if let Some(limit) = original.filter(|limit| found > *limit) {
            return Err(Error::CalibrationContext { limit, found });
        }
        let mut values = Vec::with_capacity(ids.len() * width);
        for (position, &id) in ids.iter().enumerate() {
            if id as usize >= vocab_size {
                return Err(Error::Token { found: id, vocab_size, sequence, position });
            }
            if let Entry::Vacant(entry) = rows.entry(id) {
                let mut row = vec![0.0; width];
                checkpoint.read_finite(table, id as usize * width, &mut row)?;
                for value in &mut row {
                    *value *= scale;
                }
                entry.insert(row);
            }
            values.extend_from_slice(&rows[&id]);
        }
        if let Some(positions) = positions {
            let mut table = vec![0.0; values.len()];
            checkpoint.read_finite(positions, 0, &mut table)?;
            values.iter_mut().zip(&table).for_each(|(value, position)| *value += position);
        }
        out.write(sequence, values)?;
    }
    Ok(out)
}

/// Phase of the progress: layers of the model.
pub const CALIBRATE: &str = "calibrate";

/// One layer of a checkpoint, ready to run.
pub struct StreamedLayer {
    layer_idx: usize,
    /// Layers of the model.
    of_layers: usize,
    /// Of this layer alone.
    runner: Runner<Kernels>,
}

impl StreamedLayer {
    /// Reads a layer, to run as a model runs that is loaded without options: with bf16 weights, activations are rounded
    /// to bf16 where a product begins, and so are cached keys and values.
    ///
    /// # Errors
    /// [`Error::Checkpoint`], [`Error::Missing`], [`Error::Interrupted`].
    pub fn load(checkpoint: &Checkpoint, layer_idx: usize, progress: &dyn Progress) -> Result<Self> {
        let config = checkpoint.config();
        let of_layer = |name: &String| LayerTensor::parse(name).is_some_and(|tensor| tensor.layer_idx == layer_idx);
        let names: Vec<String> = config.tensors().into_iter().map(|tensor| tensor.name).filter(of_layer).collect();
        let (done, total) = (layer_idx as u64, config.num_hidden_layers as u64);
        let within = Progressing { progress, phase: CALIBRATE, done, total };
        let tensors = weights::read(checkpoint, &names, None, None, &within)?;
        for name in &names {
            refuse_not_finite(checkpoint, name, tensors.get(name))?;
        }
        let backend = Kernels::new(Precision::Fast, WeightFormat::Stored)?;
        let block = Weights { backend: &backend, config, tensors }.block(layer_idx)?;
        // nothing is embedded and nothing scored here
        let empty = HostMatrix {
            values: Floats::zeros(config.hidden_size, DType::F32),
            out_features: 1,
            in_features: config.hidden_size,
        };
        let empty = Arc::new(backend.matrix(empty)?);
        let decoder = Decoder {
            config: alone(config, layer_idx),
            embedding_scale: 1.0,
            embed_tokens: Arc::clone(&empty),
            embed_positions: None,
            layers: vec![Arc::new(block)],
            norm: Arc::new(Norm { weight: backend.vector(vec![1.0; config.hidden_size])?, bias: None }),
            head: Head { lm_head: empty, softcap: None },
            backend: Arc::new(backend),
        };
        let storage = vec![CacheStorage::AsComputed; decoder.layers.len()];
        Ok(Self {
            layer_idx,
            of_layers: config.num_hidden_layers,
            runner: Runner::new(decoder, storage, checkpoint.dtype(), usize::MAX),
        })
    }

    /// Its index in the model.
    #[must_use]
    pub fn layer_idx(&self) -> usize {
        self.layer_idx
    }

    /// `o_proj.weight` as the checkpoint has it, `[hidden_size, num_attention_heads * head_dim]`.
    ///
    /// # Errors
    /// [`Error::Missing`], [`Error::Checkpoint`].
    pub fn o_proj(&self, checkpoint: &Checkpoint) -> Result<Vec<f32>> {
        let name = LayerTensor::weight(self.layer_idx, Module::OProj).name();
        let info = checkpoint.tensor(&name).ok_or(Error::Missing { tensor: name })?;
        let mut values = vec![0.0; info.len()];
        checkpoint.read_finite(info, 0, &mut values)?;
        Ok(values)
    }

    /// The layer with other attention weights, rounded to `dtype` as they will be written.
    ///
    /// # Errors
    /// [`Error::Argument`] where a length does not fit.
    pub fn with_attention(&self, cache: LayerCache, weights: &LayerWeights, dtype: DType) -> Result<Self> {
        let mut config = self.runner.decoder.config.clone();
        config.num_key_value_heads = vec![cache.num_key_value_heads()];
        let decoder = overlay::with_layer(&self.runner.decoder, &config, 0, weights, dtype)?;
        Ok(Self {
            layer_idx: self.layer_idx,
            of_layers: self.of_layers,
            runner: self.runner.with(decoder, self.runner.storage.clone()),
        })
    }

    /// Takes all sequences through the layer.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Interrupted`].
    pub fn run(&self, stream: &mut Activations, progress: &dyn Progress) -> Result<()> {
        for sequence in 0..stream.lengths().len() {
            let behind = self.through::<Error>(stream, sequence, true, None, progress)?;
            stream.write(sequence, behind)?;
        }
        Ok(())
    }

    /// Takes all sequences through the layer and shows what it saw of each.
    ///
    /// # Errors
    /// As [`Self::run`]; what the visitor returns.
    pub fn run_observed<E: From<Error>>(
        &self,
        stream: &mut Activations,
        visitor: &mut Visitor<'_, E>,
        progress: &dyn Progress,
    ) -> std::result::Result<(), E> {
        for sequence in 0..stream.lengths().len() {
            let behind = self.through(stream, sequence, true, Some(&mut *visitor), progress)?;
            stream.write(sequence, behind)?;
        }
        Ok(())
    }

    /// Shows what the layer sees up to its `o_proj`; the stream stays where it is.
    ///
    /// # Errors
    /// As [`Self::run_observed`].
    pub fn look<E: From<Error>>(
        &self,
        stream: &Activations,
        visitor: &mut Visitor<'_, E>,
        progress: &dyn Progress,
    ) -> std::result::Result<(), E> {
        (0..stream.lengths().len()).try_for_each(|sequence| {
            self.through(stream, sequence, false, Some(&mut *visitor), progress).map(|_same| ())
        })
    }

    /// Takes all sequences from what `o_proj` reads of them to behind the layer.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn leave(&self, stream: &mut Activations, attention: &Activations, progress: &dyn Progress) -> Result<()> {
        let progressing = self.progressing(progress);
        for sequence in 0..stream.lengths().len() {
            let mut values = stream.read(sequence)?.into_owned();
            self.runner.trace_behind(0, &mut values, &attention.read(sequence)?, &progressing)?;
            stream.write(sequence, values)?;
        }
        Ok(())
    }

    /// For the checks within the layer.
    #[must_use]
    pub fn progressing<'a>(&self, progress: &'a dyn Progress) -> Progressing<'a> {
        let (done, total) = (self.layer_idx as u64, self.of_layers as u64);
        Progressing { progress, phase: CALIBRATE, done, total }
    }

    /// The residual stream of one sequence, `behind` the layer or as it was.
    fn through<E: From<Error>>(
        &self,
        stream: &Activations,
        sequence: usize,
        behind: bool,
        visitor: Option<&mut Visitor<'_, E>>,
        progress: &dyn Progress,
    ) -> std::result::Result<Vec<f32>, E> {
        let progressing = self.progressing(progress);
        let values = stream.read(sequence)?.into_owned();
        let lengths = stream.lengths().get(sequence).copied().into_iter().collect();
        let mut one = HiddenStates { layer_idx: self.layer_idx, lengths, values };
        let (at, layer_idx) = (0, self.layer_idx);
        match visitor {
            Some(visitor) => {
                let mut named = |trace: &LayerTrace<'_>| visitor(&LayerTrace { sequence, ..*trace });
                self.runner.trace_layer(at, layer_idx, &mut one, behind, Some(&mut named), &progressing)?;
            }
            None => self.runner.trace_layer::<E>(at, layer_idx, &mut one, behind, None, &progressing)?,
        }
        Ok(one.values)
    }
}

/// What comes out of a layer with such a weight has no meaning, nor have sums over it.
fn refuse_not_finite(checkpoint: &Checkpoint, name: &str, values: Option<&Floats>) -> Result<()> {
    let (Some(values), Some(info)) = (values, checkpoint.tensor(name)) else { return Ok(()) };
    if not_finite(StoredType::Float(values.dtype()), values.stored()) == 0 {
        return Ok(());
    }
    let values = values.to_f32();
    let at = first_not_finite(&values).unwrap_or_default();
    Err(checkpoint.not_finite(info, at, values.get(at).copied().unwrap_or(f32::NAN)).into())
}

/// A configuration of one layer, with the K/V heads, the window and the rotation of layer `layer_idx`.
fn alone(config: &ModelConfig, layer_idx: usize) -> ModelConfig {
    ModelConfig {
        num_hidden_layers: 1,
        num_key_value_heads: config.num_key_value_heads.get(layer_idx).copied().into_iter().collect(),
        rope: config.rope.get(layer_idx).cloned().into_iter().collect(),
        sliding_window: config.sliding_window.get(layer_idx).copied().into_iter().collect(),
        ..config.clone()
    }
}
