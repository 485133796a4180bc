//! From a checkpoint to a [`Decoder`]: weights are read in parallel straight into place, merged where a plan says so.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use mqadapt_checkpoint::{Checkpoint, TensorInfo};
use mqadapt_compress::{KvMerge, METHODS, MergeOptions, Method, RowMerge, merge_tensor, method};
use mqadapt_core::family::{
    BlockNorms, EMBED_POSITIONS, EMBED_TOKENS, EmbeddingScale, LM_HEAD, LayerTensor, Module, NORM, NORM_BIAS,
};
use mqadapt_core::{AttentionShape, DType, ModelConfig, Plan, Progress};

use crate::attention::Attention;
use crate::backend::{Backend, Head, HostMatrix, Linear, Norm};
use crate::block::{Block, Mlp, Norms};
use crate::decoder::Decoder;
use crate::error::{Error, Result};
use crate::load::storage::Floats;

#[cfg(target_endian = "big")]
compile_error!("weights are read as the little-endian numbers that safetensors holds");

/// Bytes read at a time by one thread.
const PIECE: usize = 4 << 20;
/// Readers: more than processors, since they wait for the disk.
const READERS: usize = 4;
/// How often a long read asks whether to go on.
const PATIENCE: Duration = Duration::from_millis(50);

/// How the K/V weights of changed layers come about.
pub(crate) struct Overlay<'a> {
    pub plan: &'a Plan,
    pub rows: &'static dyn RowMerge,
    pub options: MergeOptions,
}

impl<'a> Overlay<'a> {
    pub(crate) fn new(plan: &'a Plan, name: &str, options: MergeOptions) -> Result<Self> {
        let rows = method(name).and_then(Method::rows).ok_or_else(|| Error::Method {
            found: name.to_owned(),
            known: METHODS.iter().filter(|m| m.rows().is_some()).map(|m| m.name).collect::<Vec<_>>().join(", "),
        })?;
        Ok(Self { plan, rows, options })
    }

    /// How a tensor of the checkpoint is merged, where the plan changes it.
    fn merge_of(&self, name: &str, source: &ModelConfig) -> Option<KvMerge<'_>> {
        KvMerge::of(LayerTensor::parse(name)?, source, self.plan, self.rows, &self.options)
    }
}

/// What one tensor becomes.
struct TensorLoad<'a> {
    info: &'a TensorInfo,
    /// How it is merged, where the plan changes it.
    merge: Option<KvMerge<'a>>,
    floats: Floats,
}

/// Reads the named tensors of a model whose configuration (its plan applied) is `config`.
pub(crate) fn read(
    checkpoint: &Checkpoint,
    names: &[String],
    overlay: Option<&Overlay<'_>>,
    dtype: Option<DType>,
    progress: &dyn Progress,
) -> Result<HashMap<String, Floats>> {
    let mut sources = Vec::with_capacity(names.len());
    let mut sizes = Vec::with_capacity(names.len());
    for name in names {
        let info = checkpoint.tensor(name).ok_or_else(|| Error::Missing { tensor: name.clone() })?;
        let dtype = dtype.or(info.dtype.computed()).unwrap_or(checkpoint.dtype());
        let merge = overlay.and_then(|overlay| overlay.merge_of(name, checkpoint.config()));
        let len = merge.as_ref().map_or(info.len(), |merge| info.len() / merge.source_heads * merge.heads);
        sources.push((info, merge));
        sizes.push((len, dtype));
    }
    let places = Floats::try_zeros_together(&sizes)
        .map_err(|nth| Error::Weights { tensor: names[nth].clone(), values: sizes[nth].0 })?;
    let mut wanted: Vec<_> =
        sources.into_iter().zip(places).map(|((info, merge), floats)| TensorLoad { info, merge, floats }).collect();
    fill(checkpoint, &mut wanted, progress)?;
    Ok(names.iter().cloned().zip(wanted.into_iter().map(|wanted| wanted.floats)).collect())
}

/// A piece of work for a reader.
enum Task<'a> {
    /// Values from the first on, as they are.
    Read { info: &'a TensorInfo, dtype: DType, first: usize, out: &'a mut [u8] },
    /// A whole tensor, merged.
    Merge { info: &'a TensorInfo, merge: &'a KvMerge<'a>, out: &'a mut Floats },
}

fn fill(checkpoint: &Checkpoint, wanted: &mut [TensorLoad<'_>], progress: &dyn Progress) -> Result<()> {
    let mut tasks = Vec::new();
    for TensorLoad { info, merge, floats } in wanted {
        if let Some(merge) = merge {
            tasks.push(Task::Merge { info, merge, out: floats });
            continue;
        }
        let dtype = floats.dtype();
        let pieces = floats.bytes_mut().chunks_mut(PIECE).enumerate();
        tasks.extend(pieces.map(|(nth, out)| Task::Read { info, dtype, first: nth * PIECE / dtype.bytes(), out }));
    }
    let bytes = |task: &Task<'_>| match task {
        Task::Read { out, .. } => out.len() as u64,
        Task::Merge { info, .. } => info.bytes,
    };
    let total: u64 = tasks.iter().map(bytes).sum();
    let count = tasks.len();
    let tasks: Vec<Mutex<Option<Task<'_>>>> = tasks.into_iter().map(|task| Mutex::new(Some(task))).collect();
    let (next, done, stop) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let (sender, receiver) = mpsc::channel::<Result<()>>();
    thread::scope(|scope| {
        for _ in 0..READERS.min(count) {
            let (tasks, next, done, stop, sender) = (&tasks, &next, &done, &stop, sender.clone());
            scope.spawn(move || {
                while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    let taken = task.lock().unwrap_or_else(PoisonError::into_inner).take();
                    let Some(task) = taken else { continue };
                    let size = bytes(&task);
                    let result = perform(checkpoint, task);
                    done.fetch_add(size, Ordering::Relaxed);
                    let failed = result.is_err();
                    if sender.send(result).is_err() || failed {
                        return;
                    }
                }
            });
        }
        drop(sender);
        // this thread hears of results and asks whether to go on: a signal reaches no other
        let mut outcome = Ok(());
        loop {
            let heard = receiver.recv_timeout(PATIENCE);
            let told = progress.advance("bytes", done.load(Ordering::Relaxed), total);
            outcome = outcome.and(told.map_err(Error::from));
            match heard {
                Ok(result) => outcome = outcome.and(result),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return outcome,
            }
            if outcome.is_err() {
                stop.store(true, Ordering::Relaxed);
            }
        }
    })
}

fn perform(checkpoint: &Checkpoint, task: Task<'_>) -> Result<()> {
    match task {
        Task::Read { info, dtype, first, out } => checkpoint.read_as(info, dtype, first, out).map(drop)?,
        Task::Merge { info, merge, out } => {
            let mut source = vec![0.0; info.len()];
            checkpoint.read_finite(info, 0, &mut source)?;
            let mut values = vec![0.0; info.len() / merge.source_heads * merge.heads];
            merge_tensor(merge.method, merge.options, merge.tensor, &source, merge.source_heads, &mut values);
            out.fill_from_f32(&values);
        }
    }
    Ok(())
}

/// The tensors that have been read, on their way into a backend.
pub(crate) struct Weights<'a, B: Backend> {
    pub backend: &'a B,
    pub config: &'a ModelConfig,
    pub tensors: HashMap<String, Floats>,
}

impl<B: Backend> Weights<'_, B> {
    fn take(&mut self, name: String) -> Result<Floats> {
        self.tensors.remove(&name).ok_or(Error::Missing { tensor: name })
    }

    fn matrix(&mut self, name: String, out_features: usize, in_features: usize) -> Result<Arc<B::Matrix>> {
        let values = self.take(name)?;
        Ok(Arc::new(self.backend.matrix(HostMatrix { values, out_features, in_features })?))
    }

    /// A norm; what it gives is divided.
    fn norm(&mut self, weight: String, bias: Option<String>, divisor: f64) -> Result<Norm<B>> {
        let divided = |mut values: Vec<f32>| {
            if divisor != 1.0 {
                for value in &mut values {
                    *value = (f64::from(*value) / divisor) as f32;
                }
            }
            self.backend.vector(values)
        };
        let take = |tensors: &mut HashMap<String, Floats>, name: String| {
            tensors.remove(&name).map(|floats| floats.to_f32()).ok_or(Error::Missing { tensor: name })
        };
        let mut weight = take(&mut self.tensors, weight)?;
        if self.config.family.forward.norm_weight_plus_one {
            for w in &mut weight {
                *w += 1.0;
            }
        }
        let bias = bias.map(|bias| divided(take(&mut self.tensors, bias)?)).transpose()?;
        Ok(Norm { weight: divided(weight)?, bias })
    }

    /// A linear layer of a decoder layer, with its bias where the model has one.
    pub(crate) fn linear(&mut self, layer_idx: usize, module: Module) -> Result<Linear<B>> {
        let shape = self.config.weight_shape(layer_idx, module).unwrap_or_default();
        let name = LayerTensor::weight(layer_idx, module).name();
        let &[out_features, in_features] = shape.as_slice() else { return Err(Error::Missing { tensor: name }) };
        let weight = self.matrix(name, out_features, in_features)?;
        let bias = if self.config.has_bias(module) {
            let bias = self.take(LayerTensor::bias(layer_idx, module).name())?.to_f32();
            Some(Arc::new(self.backend.vector(bias)?))
        } else {
            None
        };
        Ok(Linear { weight, bias })
    }

    /// A whole layer.
    pub(crate) fn block(&mut self, layer_idx: usize) -> Result<Block<B>> {
        Ok(Block {
            norms: Arc::new(self.norms(layer_idx)?),
            self_attn: Attention {
                shape: attention(self.config, layer_idx)?,
                q_proj: self.linear(layer_idx, Module::QProj)?,
                k_proj: self.linear(layer_idx, Module::KProj)?,
                v_proj: self.linear(layer_idx, Module::VProj)?,
                o_proj: self.linear(layer_idx, Module::OProj)?,
                q_norm: self.layer_norm(layer_idx, Module::QNorm)?.map(Arc::new),
                k_norm: self.layer_norm(layer_idx, Module::KNorm)?.map(Arc::new),
            },
            mlp: Arc::new(Mlp {
                gate_proj: match self.config.weight_shape(layer_idx, Module::GateProj) {
                    Some(_) => Some(self.linear(layer_idx, Module::GateProj)?),
                    None => None,
                },
                up_proj: self.linear(layer_idx, Module::UpProj)?,
                down_proj: self.linear(layer_idx, Module::DownProj)?,
                hidden_act: self.config.hidden_act,
            }),
            eps: self.config.rms_norm_eps as f32,
            residual_multiplier: self.config.residual_multiplier as f32,
            parallel: self.config.parallel_residual,
        })
    }

    /// A norm of a decoder layer, where it is among the tensors.
    pub(crate) fn changed_norm(&mut self, layer_idx: usize, module: Module) -> Result<Option<Norm<B>>> {
        let there = self.tensors.contains_key(&LayerTensor::weight(layer_idx, module).name());
        if there { self.layer_norm(layer_idx, module) } else { Ok(None) }
    }

    /// A norm of a decoder layer, where the family has it.
    fn layer_norm(&mut self, layer_idx: usize, module: Module) -> Result<Option<Norm<B>>> {
        if self.config.weight_shape(layer_idx, module).is_none() {
            return Ok(None);
        }
        let bias = self.config.has_bias(module).then(|| LayerTensor::bias(layer_idx, module).name());
        self.norm(LayerTensor::weight(layer_idx, module).name(), bias, 1.0).map(Some)
    }

    fn norms(&mut self, layer_idx: usize) -> Result<Norms<B>> {
        let post_attention = self.layer_norm(layer_idx, Module::PostAttentionLayernorm)?;
        // of families with norms before the blocks alone, this one is the MLP's
        let (behind_attention, before_mlp) = match self.config.family.forward.block_norms {
            BlockNorms::Before => (None, post_attention),
            BlockNorms::Behind => (post_attention, None),
            BlockNorms::Around => (post_attention, self.layer_norm(layer_idx, Module::PreFeedforwardLayernorm)?),
        };
        Ok(Norms {
            before_attention: self.layer_norm(layer_idx, Module::InputLayernorm)?,
            behind_attention,
            before_mlp,
            behind_mlp: self.layer_norm(layer_idx, Module::PostFeedforwardLayernorm)?,
        })
    }
}

/// The attention of a layer that the model has.
pub(crate) fn attention(config: &ModelConfig, layer_idx: usize) -> Result<AttentionShape> {
    config.attention(layer_idx).ok_or_else(|| Error::Argument {
        name: "layer_idx",
        detail: format!("must be below {}; found {layer_idx}", config.num_hidden_layers),
    })
}

/// Refuses a family without a forward pass.
pub(crate) fn refuse_not_runnable(config: &ModelConfig) -> Result<()> {
    if config.family.runnable { Ok(()) } else { Err(Error::NotRunnable { model_type: config.family.model_type }) }
}

/// Factor on the embeddings, rounded to their dtype where transformers does that.
pub(crate) fn embedding_scale(config: &ModelConfig, dtype: DType) -> f32 {
    match config.family.forward.embedding_scale {
        EmbeddingScale::SqrtHiddenSize => {
            Floats::from_f32(&[(config.hidden_size as f64).sqrt() as f32], dtype).to_f32()[0]
        }
        EmbeddingScale::One | EmbeddingScale::Multiplier => config.embedding_multiplier as f32,
    }
}

/// Loads the whole model. `config`: with the K/V heads of the overlay's plan.
pub(crate) fn decoder<B: Backend>(
    checkpoint: &Checkpoint,
    backend: B,
    config: &ModelConfig,
    overlay: Option<&Overlay<'_>>,
    dtype: Option<DType>,
    progress: &dyn Progress,
) -> Result<Decoder<B>> {
    refuse_not_runnable(config)?;
    if !config.stored.lm_head {
        return Err(Error::BaseModel { path: checkpoint.path().to_owned() });
    }
    let mut names: Vec<String> = config.tensors().into_iter().map(|tensor| tensor.name).collect();
    let pair = [EMBED_TOKENS, LM_HEAD].map(|name| checkpoint.tensor(name));
    if config.tie_word_embeddings && pair[1].is_some() && pair[0] != pair[1] {
        names.push(LM_HEAD.to_owned());
    }
    let tensors = read(checkpoint, &names, overlay, dtype, progress)?;
    // transformers 5 does not tie a pair that is stored with different values, whatever the flag says
    let same = tensors.get(LM_HEAD).is_none_or(|lm_head| tensors.get(EMBED_TOKENS).is_some_and(|e| e.same(lm_head)));
    let config = &ModelConfig { tie_word_embeddings: config.tie_word_embeddings && same, ..config.clone() };
    let embedding_dtype = tensors.get(EMBED_TOKENS).map_or(DType::F32, Floats::dtype);
    let mut weights = Weights { backend: &backend, config, tensors };
    let (vocab_size, hidden_size) = (config.vocab_size, config.hidden_size);
    let embed_tokens = weights.matrix(EMBED_TOKENS.to_owned(), vocab_size, hidden_size)?;
    let embed_positions = match config.learned_positions() {
        Some(rows) => Some(weights.matrix(EMBED_POSITIONS.to_owned(), rows, hidden_size)?),
        None => None,
    };
    let lm_head = if config.tie_word_embeddings {
        Arc::clone(&embed_tokens)
    } else {
        weights.matrix(LM_HEAD.to_owned(), vocab_size, hidden_size)?
    };
    let layers: Result<Vec<_>> = (0..config.num_hidden_layers).map(|idx| weights.block(idx).map(Arc::new)).collect();
    let bias = config.norm_bias().then(|| NORM_BIAS.to_owned());
    let (layers, norm) = (layers?, Arc::new(weights.norm(NORM.to_owned(), bias, config.logits_scaling)?));
    let embedding_scale = embedding_scale(config, embedding_dtype);
    let head = Head { lm_head, softcap: config.final_logit_softcapping.map(|cap| cap as f32) };
    let backend = Arc::new(backend);
    Ok(Decoder { backend, config: config.clone(), embedding_scale, embed_tokens, embed_positions, layers, norm, head })
}
