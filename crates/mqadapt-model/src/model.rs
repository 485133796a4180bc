//! The model as its users see it: which backend runs it is decided here and nowhere else.

use mqadapt_checkpoint::Checkpoint;
use mqadapt_compress::{LayerWeights, MergeOptions};
use mqadapt_core::{DType, LayerCache, ModelConfig, NoProgress, Plan, Progress, cost};
use xxhash_rust::xxh3::xxh3_64;

use crate::backend::{Backend, Kernels, Stock};
use crate::decoder::Decoder;
use crate::load::overlay;
use crate::load::weights::{self, Overlay};
use crate::run::session::Runner;
use crate::{Device, Error, LoadOptions, MOST_TOKENS_IN_FLIGHT, Result, WeightFormat};

/// A decoder-only language model, ready to run. Calls from several threads wait for each other.
pub struct Model {
    engine: Engine,
    plan: Plan,
    fingerprint: String,
    /// Of weights that are replaced.
    dtype: DType,
    options: LoadOptions,
    /// Layers with weights that are not of the checkpoint and plan.
    replaced: Vec<usize>,
}

/// The model on the backend that runs it.
enum Engine {
    Kernels(Runner<Kernels>),
    Stock(Runner<Stock>),
}

/// The same expression for whichever backend runs the model.
macro_rules! on_backend {
    ($engine:expr, $runner:ident => $work:expr) => {
        match $engine {
            Engine::Kernels($runner) => $work,
            Engine::Stock($runner) => $work,
        }
    };
}

mod run; // after the macro, which it uses

impl From<Runner<Kernels>> for Engine {
    fn from(runner: Runner<Kernels>) -> Self {
        Self::Kernels(runner)
    }
}

impl From<Runner<Stock>> for Engine {
    fn from(runner: Runner<Stock>) -> Self {
        Self::Stock(runner)
    }
}

/// The names of what a model computes, as 16 hexadecimal digits.
fn name_of(parts: &[&str]) -> String {
    format!("{:016x}", xxh3_64(parts.join("\n").as_bytes()))
}

impl Model {
    /// Loads a checkpoint; a plan in the options is applied while reading, with the logits of the converted checkpoint
    /// bit for bit. Progress: bytes.
    ///
    /// # Errors
    /// [`Error::Checkpoint`], [`Error::Missing`], [`Error::Argument`], [`Error::Method`], [`Error::Device`], [`Error::Interrupted`].
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions, progress: &dyn Progress) -> Result<Self> {
        let source = checkpoint.config();
        let plan = options.plan.clone().unwrap_or_else(|| Plan::keep(source));
        let in_flight = options.max_tokens_in_flight;
        if !(1..=MOST_TOKENS_IN_FLIGHT).contains(&in_flight) {
            let detail = format!("must be from 1 to {MOST_TOKENS_IN_FLIGHT}; found {in_flight}");
            return Err(Error::Argument { name: "max_tokens_in_flight", detail });
        }
        if options.weights == WeightFormat::Int8 && options.device != Device::Cpu {
            return Err(Error::Argument { name: "weights", detail: "'int8' needs device 'cpu'".to_owned() });
        }
        if plan.source_num_key_value_heads() != source.num_key_value_heads {
            let detail = "was made for a model with other K/V heads".to_owned();
            return Err(Error::Argument { name: "plan", detail });
        }
        let overlay = if plan.is_keep() { None } else { Some(Overlay::new(&plan, &options.method, options.merge)?) };
        let config = planned(source, &plan);
        let dtype = options.dtype.unwrap_or(checkpoint.dtype());
        let overlay = overlay.as_ref();
        let weights = Loading { checkpoint, config: &config, plan: &plan, overlay, options, progress };
        if let Some((_, storage)) = plan.stored_layer().filter(|_| options.device != Device::Cpu) {
            return Err(Error::Storage { storage: storage.name() });
        }
        let engine = match options.device {
            Device::Cpu => Engine::Kernels(weights.runner(Kernels::new(options.precision, options.weights)?, dtype)?),
            Device::CpuStock => Engine::Stock(weights.runner(Stock::cpu(), DType::F32)?),
            Device::Cuda(index) => Engine::Stock(weights.runner(Stock::cuda(index)?, dtype)?),
        };
        let fingerprint = fingerprint(&checkpoint.fingerprint()?, &plan, options);
        Ok(Self { engine, plan, fingerprint, dtype, options: options.clone(), replaced: Vec::new() })
    }

    /// The same model under another plan for its checkpoint; unchanged layers are shared, so this takes the time and
    /// memory of the changed K/V projections only.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn with_plan(&self, checkpoint: &Checkpoint, plan: &Plan, method: &str, merge: &MergeOptions) -> Result<Self> {
        let source = checkpoint.config();
        if plan.source_num_key_value_heads() != self.plan.source_num_key_value_heads() {
            let detail = "was made for a model with other K/V heads".to_owned();
            return Err(Error::Argument { name: "plan", detail });
        }
        self.check_storage(plan)?;
        let overlay = Overlay::new(plan, method, *merge)?;
        let config = planned(source, plan);
        let layers: Vec<usize> = (0..config.num_hidden_layers)
            .filter(|&idx| plan.changes(idx) || self.plan.changes(idx) || self.replaced.contains(&idx))
            .collect();
        let mut options = self.options.clone();
        (options.plan, options.method, options.merge) = (Some(plan.clone()), method.to_owned(), *merge);
        let engine = on_backend!(&self.engine, runner => runner
            .with(overlay::with_plan(&runner.decoder, checkpoint, &config, &overlay, &layers, options.dtype, &NoProgress)?, plan.storage())
            .into());
        let fingerprint = fingerprint(&checkpoint.fingerprint()?, plan, &options);
        Ok(Self { engine, plan: plan.clone(), fingerprint, dtype: self.dtype, options, replaced: Vec::new() })
    }

    /// The same model with one layer's attention replaced; everything else is shared. Values are rounded once to the dtype of
    /// the weights that they replace; a bias that is not given stays.
    ///
    /// # Errors
    /// [`Error::Argument`] where a length does not fit.
    pub fn with_layer(&self, layer_idx: usize, cache: LayerCache, weights: &LayerWeights) -> Result<Self> {
        let wrong = |detail: String| Error::Argument { name: "weights", detail };
        let mut caches = self.plan.layers().to_vec();
        let own =
            caches.get_mut(layer_idx).ok_or_else(|| wrong(format!("are for layer {layer_idx}, which is not there")))?;
        *own = cache;
        let plan = Plan::from_layers(&caches, self.plan.unmerged().layers())?;
        self.check_storage(&plan)?;
        let config = planned(self.config(), &plan);
        let engine = on_backend!(&self.engine, runner => runner
            .with(overlay::with_layer(&runner.decoder, &config, layer_idx, weights, self.dtype)?, plan.storage())
            .into());
        let fingerprint = name_of(&[&self.fingerprint, &layer_idx.to_string(), &overlay::fingerprint(weights)]);
        let mut replaced = self.replaced.clone();
        replaced.push(layer_idx);
        Ok(Self { engine, plan, fingerprint, dtype: self.dtype, options: self.options.clone(), replaced })
    }

    /// The same model with some layers taken from models of the same checkpoint, dtype and device; all weights are shared.
    /// So a sweep merges every layer once, and puts plans together from what it has.
    ///
    /// # Errors
    /// [`Error::Argument`] for a layer that is not there or a model of another kind.
    pub fn with_layers_of(&self, layers: &[(usize, &Self)]) -> Result<Self> {
        let wrong = |detail: &str| Error::Argument { name: "layers", detail: detail.to_owned() };
        let mut caches = self.plan.layers().to_vec();
        let (mut replaced, mut names) = (self.replaced.clone(), vec![self.fingerprint.clone()]);
        for (layer_idx, donor) in layers {
            let theirs = donor.plan.layers().get(*layer_idx);
            let (Some(own), Some(&theirs)) = (caches.get_mut(*layer_idx), theirs) else {
                return Err(wrong("name one that is not there"));
            };
            if donor.plan.source_num_key_value_heads() != self.plan.source_num_key_value_heads()
                || donor.dtype != self.dtype
                || donor.config().hidden_size != self.config().hidden_size
            {
                return Err(wrong("are of a model of another shape or dtype"));
            }
            *own = theirs;
            replaced.push(*layer_idx);
            names.push(format!("{layer_idx} {}", donor.fingerprint));
        }
        let plan = Plan::from_layers(&caches, self.plan.unmerged().layers())?;
        let config = planned(self.config(), &plan);
        let engine = match &self.engine {
            Engine::Kernels(runner) => {
                let donors: Option<Vec<_>> = layers
                    .iter()
                    .map(|(idx, donor)| match &donor.engine {
                        Engine::Kernels(donor) => Some((*idx, &donor.decoder)),
                        Engine::Stock(_) => None,
                    })
                    .collect();
                let donors = donors.ok_or_else(|| wrong("are on another device"))?;
                Engine::Kernels(runner.with(overlay::with_layers_of(&runner.decoder, config, &donors)?, plan.storage()))
            }
            Engine::Stock(runner) => {
                let donors: Option<Vec<_>> = layers
                    .iter()
                    .map(|(idx, donor)| match &donor.engine {
                        Engine::Stock(donor) => Some((*idx, &donor.decoder)),
                        Engine::Kernels(_) => None,
                    })
                    .collect();
                let donors = donors.ok_or_else(|| wrong("are on another device"))?;
                Engine::Stock(runner.with(overlay::with_layers_of(&runner.decoder, config, &donors)?, plan.storage()))
            }
        };
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let fingerprint = name_of(&names);
        Ok(Self { engine, plan, fingerprint, dtype: self.dtype, options: self.options.clone(), replaced })
    }

    /// Whether the device stores caches as a plan says.
    fn check_storage(&self, plan: &Plan) -> Result<()> {
        match plan.stored_layer() {
            Some((_, storage)) if self.options.device != Device::Cpu => Err(Error::Storage { storage: storage.name() }),
            _ => Ok(()),
        }
    }

    /// The configuration, its K/V heads those of the plan.
    #[must_use]
    pub fn config(&self) -> &ModelConfig {
        on_backend!(&self.engine, runner => &runner.decoder.config)
    }

    /// The plan that was applied.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Names what this model computes: checkpoint, plan, method, options, dtypes and device, as 16 hexadecimal digits.
    #[must_use]
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// Bytes of K/V cache that are allocated now.
    #[must_use]
    pub fn kv_bytes(&self) -> u64 {
        on_backend!(&self.engine, runner => runner.kv_bytes())
    }

    /// Bytes that one token takes in the K/V cache.
    #[must_use]
    pub fn kv_bytes_per_token(&self) -> u64 {
        cost::kv_bytes_per_token(self.config(), &self.plan, self.kv_value_bytes())
    }

    /// Bytes of one value in the K/V cache.
    #[must_use]
    pub fn kv_value_bytes(&self) -> usize {
        on_backend!(&self.engine, runner => runner.kv_dtype).bytes()
    }

    /// Bytes that one decode step of one sequence reads with `depth` tokens cached: the weights of the layers and of
    /// `lm_head`, and the cache. What limits its speed on most machines.
    #[must_use]
    pub fn bytes_per_step(&self, depth: usize) -> u64 {
        on_backend!(&self.engine, runner => runner.bytes_per_step(depth))
    }
}

/// What all backends load from.
struct Loading<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    plan: &'a Plan,
    overlay: Option<&'a Overlay<'a>>,
    options: &'a LoadOptions,
    progress: &'a dyn Progress,
}

impl Loading<'_> {
    /// `kv_dtype`: of the cache, unless the options say otherwise.
    fn runner<B: Backend>(&self, backend: B, kv_dtype: DType) -> Result<Runner<B>> {
        let Self { checkpoint, config, plan, overlay, options, progress } = *self;
        let decoder: Decoder<B> = weights::decoder(checkpoint, backend, config, overlay, options.dtype, progress)?;
        Ok(Runner::new(decoder, plan.storage(), options.kv_dtype.unwrap_or(kv_dtype), options.max_tokens_in_flight))
    }
}

/// The configuration with the plan's heads.
fn planned(source: &ModelConfig, plan: &Plan) -> ModelConfig {
    ModelConfig { num_key_value_heads: plan.num_key_value_heads(), ..source.clone() }
}

fn fingerprint(checkpoint: &str, plan: &Plan, options: &LoadOptions) -> String {
    let LoadOptions { method, merge, dtype, weights, kv_dtype, device, precision, .. } = options;
    let merge = if plan.is_keep() { String::new() } else { format!("{method} {merge:?}") };
    name_of(&[
        checkpoint,
        &plan.to_string(),
        &merge,
        &format!("{dtype:?} {weights:?} {kv_dtype:?} {device:?} {precision:?}"),
    ])
}
