//! Merging from calibration text: statistics of each layer, its merge, and the refit on the converted stream.
//!
//! In: a checkpoint, token sequences or saved statistics, and a layer's weights. Out: the merged weights and what they
//! cost. Layers are taken in order; besides the residual streams only one layer is in memory.

use mqadapt_checkpoint::Checkpoint;
use mqadapt_core::family::{LayerTensor, Module};
use mqadapt_core::{DType, ModelConfig, Plan, Progress};
use mqadapt_merge::closed_form::{self, ClosedFormOptions, Cut, LayerReport, Measurement};
use mqadapt_merge::{
    Accumulator, LayerGeometry, LayerStatistics, LayerWeights, MergeOptions, REFIT_LAMBDA, Refit, StatisticsShape,
    prune,
};

use crate::overlay::AttentionWeights;
use crate::states::HiddenStates;
use crate::statistics_file::StatisticsFile;
use crate::stream::{StreamedLayer, embed};
use crate::{Error, LoadOptions, Model, Result};

/// Tokens of each target context on which cuts are measured.
const MEASURED_TOKENS: usize = 1536;

/// Calibration text, and the contexts that the converted model is for.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// Token ids, each sequence from position 0.
    pub sequences: Vec<Vec<u32>>,
    /// Contexts in tokens that decide between fast and slow rotary pairs.
    pub target_contexts: Vec<usize>,
}

impl Calibration {
    /// Sequences by index and the tokens of each that serve to measure a layer's cut: of every target context about
    /// [`MEASURED_TOKENS`], one sequence at least.
    pub(crate) fn measured(&self) -> Vec<(usize, usize)> {
        let mut out = Vec::new();
        let mut next = 0;
        for &context in &self.target_contexts {
            let fitting: Vec<usize> =
                (0..self.sequences.len()).filter(|i| self.sequences[*i].len() >= context).collect();
            if context == 0 || fitting.is_empty() {
                continue;
            }
            let wanted = (MEASURED_TOKENS / context).clamp(1, fitting.len());
            for _ in 0..wanted {
                out.push((fitting[next % fitting.len()], context));
                next += 1;
            }
        }
        out
    }
}

/// What is known of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSample {
    /// Sums over the calibration text.
    pub statistics: LayerStatistics,
    /// Inputs on which cuts are measured, `[tokens, hidden_size]` each.
    pub inputs: Vec<Vec<f32>>,
}

/// How a layer is merged from what is known of it.
#[derive(Debug, Clone, PartialEq)]
pub enum CalibratedMethod {
    /// `closed-form`: [`closed_form::merge`]; `sequential` refits `o_proj` on the converted stream.
    ClosedForm {
        /// What the merge is told.
        options: ClosedFormOptions,
        /// Refit `o_proj` of every merged layer.
        sequential: bool,
    },
    /// `prune`: [`prune`].
    Prune,
}

/// A merged layer.
#[derive(Debug, Clone, PartialEq)]
pub struct CalibratedLayer {
    /// Its weights.
    pub weights: LayerWeights,
    /// What was done, and the damage predicted.
    pub report: LayerReport,
    /// Relative error of the attention output on the converted stream, before and after the refit.
    pub refit: Option<(f64, f64)>,
    /// Kept heads, where the method prunes.
    pub kept: Option<Vec<usize>>,
}

/// The geometry of a layer of a model.
#[must_use]
pub fn layer_geometry(config: &ModelConfig, layer_idx: usize) -> LayerGeometry {
    let heads = crate::load::heads(config, layer_idx);
    LayerGeometry {
        num_attention_heads: heads.num_attention_heads,
        num_key_value_heads: heads.num_key_value_heads,
        head_dim: heads.head_dim,
        hidden_size: config.hidden_size,
        inv_freq: config.rope.inv_freq(),
        scaling: f64::from(heads.scaling),
        qk_norm: config.family.forward.qk_norm,
        sliding_window: heads.sliding_window,
        attn_logit_softcapping: None,
    }
}

/// Runs the original layer, and the converted one beside it, over the calibration text.
struct Streams {
    original: HiddenStates,
    /// None while nothing has been converted.
    converted: Option<HiddenStates>,
}

/// Merges the layers of a checkpoint, one by one in ascending order.
pub struct CalibratedMerge<'a> {
    checkpoint: &'a Checkpoint,
    calibration: Calibration,
    method: CalibratedMethod,
    /// Saved statistics; they replace the pass over the text unless the method is sequential.
    saved: Option<StatisticsFile>,
    /// Type that converted weights will be written in.
    dtype: DType,
    streams: Option<Streams>,
}

impl<'a> CalibratedMerge<'a> {
    /// Without `saved` statistics the text has to have tokens; `dtype` is that of the converted weights.
    ///
    /// # Errors
    /// [`Error::Argument`] where there is neither text nor statistics; [`Error::Statistics`] where these are of another model.
    pub fn new(
        checkpoint: &'a Checkpoint,
        calibration: Calibration,
        method: CalibratedMethod,
        saved: Option<StatisticsFile>,
        dtype: DType,
    ) -> Result<Self> {
        let sequential = matches!(method, CalibratedMethod::ClosedForm { sequential: true, .. });
        let empty = calibration.sequences.iter().all(Vec::is_empty);
        if empty && (saved.is_none() || sequential) {
            let detail = "has no tokens; give a text of a few thousand".to_owned();
            return Err(Error::Argument { name: "calibration", detail });
        }
        if let Some(saved) = &saved {
            saved.check_model(&checkpoint.fingerprint()?)?;
        }
        Ok(Self { checkpoint, calibration, method, saved, dtype, streams: None })
    }

    /// Merges layer `layer_idx`, whose weights these are, into `heads` K/V heads. Layers must ascend from call to call.
    ///
    /// # Errors
    /// [`Error::Merge`], and what reading and running the layers before gives.
    pub fn merge_layer(
        &mut self,
        layer_idx: usize,
        heads: usize,
        weights: &LayerWeights,
        progress: &dyn Progress,
    ) -> Result<CalibratedLayer> {
        let geometry = layer_geometry(self.checkpoint.config(), layer_idx);
        let failed = |source| Error::Merge { layer_idx, source };
        let sequential = matches!(self.method, CalibratedMethod::ClosedForm { sequential: true, .. });
        let mut run = None;
        if self.saved.is_none() || sequential {
            let block = block_heads(&geometry, geometry.num_key_value_heads / heads.max(1));
            self.advance(layer_idx, progress)?;
            run = Some(self.visit(layer_idx, &geometry, weights, sequential, block, progress)?);
        }
        let sample = match (&self.saved, run.as_mut().and_then(|run| run.sample.take())) {
            (Some(saved), _) => saved.layer(layer_idx, &geometry)?,
            (None, Some(sample)) => sample,
            (None, None) => {
                return Err(Error::Argument { name: "calibration", detail: "gave no statistics".to_owned() });
            }
        };
        let mut merged = match &self.method {
            CalibratedMethod::Prune => {
                let (weights, kept) = prune(weights, &geometry, heads, &sample.statistics).map_err(failed)?;
                let report = LayerReport { num_key_value_heads: heads, ..LayerReport::default() };
                CalibratedLayer { weights, report, refit: None, kept: Some(kept) }
            }
            CalibratedMethod::ClosedForm { options, .. } => {
                let (measurement, options) =
                    measurement(weights, &geometry, &sample, options, &self.calibration).map_err(failed)?;
                let merged =
                    closed_form::merge(weights, &geometry, heads, &sample.statistics, &options, measurement.as_ref());
                let (weights, report) = merged.map_err(failed)?;
                CalibratedLayer { weights, report, refit: None, kept: None }
            }
        };
        drop(sample);
        if let (true, Some(run)) = (sequential, run) {
            self.refit(&run, &geometry, weights, &mut merged, progress)?;
        }
        Ok(merged)
    }

    /// Takes the streams through the layers before `layer_idx`.
    fn advance(&mut self, layer_idx: usize, progress: &dyn Progress) -> Result<()> {
        let mut streams = match self.streams.take() {
            Some(streams) if streams.original.layer_idx <= layer_idx => streams,
            Some(streams) => {
                let detail = format!("was asked for after layer {}; layers must ascend", streams.original.layer_idx);
                return Err(Error::Argument { name: "layer_idx", detail });
            }
            None => Streams { original: embed(self.checkpoint, &self.calibration.sequences)?, converted: None },
        };
        while streams.original.layer_idx < layer_idx {
            let layer = StreamedLayer::load(self.checkpoint, streams.original.layer_idx, &mqadapt_core::NoProgress)?;
            layer.run(&mut streams.original, &mut |_| Ok(()), progress)?;
            if let Some(converted) = &mut streams.converted {
                layer.run(converted, &mut |_| Ok(()), progress)?;
            }
        }
        self.streams = Some(streams);
        Ok(())
    }

    /// Takes the original stream through the layer, collecting what is not saved.
    fn visit(
        &mut self,
        layer_idx: usize,
        geometry: &LayerGeometry,
        weights: &LayerWeights,
        sequential: bool,
        block: usize,
        progress: &dyn Progress,
    ) -> Result<Visit> {
        let layer = StreamedLayer::load(self.checkpoint, layer_idx, &mqadapt_core::NoProgress)?;
        let Some(streams) = &mut self.streams else {
            return Err(Error::Argument { name: "layer_idx", detail: "has no residual stream".to_owned() });
        };
        if sequential && streams.converted.is_none() {
            streams.converted = Some(streams.original.clone());
        }
        let mut attention = Vec::new();
        let mut collector = match self.saved {
            Some(_) => None,
            None => Some(Collector::new(geometry, &weights.o_proj, &self.calibration, layer_idx, block)?),
        };
        layer.run(
            &mut streams.original,
            &mut |trace| {
                if sequential {
                    attention.push(trace.attention.to_vec());
                }
                collector.as_mut().map_or(Ok(()), |collector| collector.add(trace))
            },
            progress,
        )?;
        Ok(Visit { layer, sample: collector.map(Collector::finish), attention })
    }

    /// Refits `o_proj` on the converted stream, and takes it through the converted layer.
    fn refit(
        &mut self,
        run: &Visit,
        geometry: &LayerGeometry,
        original: &LayerWeights,
        merged: &mut CalibratedLayer,
        progress: &dyn Progress,
    ) -> Result<()> {
        let layer_idx = run.layer.layer_idx();
        let failed = |source| Error::Merge { layer_idx, source };
        let Some(stream) = self.streams.as_mut().and_then(|streams| streams.converted.as_mut()) else { return Ok(()) };
        let features = geometry.num_attention_heads * geometry.head_dim;
        let mut sums =
            Refit::new(&merged.weights.o_proj, &original.o_proj, features, geometry.hidden_size).map_err(failed)?;
        let heads = merged.report.num_key_value_heads;
        let converted = run.layer.with_attention(&attention_weights(&merged.weights, heads), self.dtype)?;
        let mut sequence = 0;
        let mut add = |attention: &[f32]| {
            let original = run.attention.get(sequence).map_or(&[][..], Vec::as_slice);
            sequence += 1;
            sums.add_sequence(attention, original).map_err(failed)
        };
        converted.attention(stream, &mut add, progress)?;
        let refitted = sums.solve(REFIT_LAMBDA).map_err(failed)?;
        merged.weights.o_proj = refitted.o_proj;
        merged.refit = Some((refitted.error_before, refitted.error_after));
        let converted = run.layer.with_attention(&attention_weights(&merged.weights, heads), self.dtype)?;
        converted.run(stream, &mut |_| Ok(()), progress)
    }
}

impl Model {
    /// Loads a checkpoint and applies the plan in the options by a method that needs calibration text: the logits of the
    /// checkpoint that the same merge converts. Progress: bytes, then layers.
    ///
    /// # Errors
    /// As [`Model::load`] and [`CalibratedMerge::merge_layer`].
    pub fn load_calibrated(
        checkpoint: &Checkpoint,
        options: &LoadOptions,
        merge: &mut CalibratedMerge<'_>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let unchanged = LoadOptions { plan: None, ..options.clone() };
        let model = Self::load(checkpoint, &unchanged, progress)?;
        let Some(plan) = &options.plan else { return Ok(model) };
        model.with_merged_layers(checkpoint, plan, merge, progress)
    }

    /// The same model under a plan for its checkpoint, merged from calibration text; what does not change is shared.
    ///
    /// # Errors
    /// As [`Model::with_plan`] and [`CalibratedMerge::merge_layer`].
    pub fn with_merged_layers(
        &self,
        checkpoint: &Checkpoint,
        plan: &Plan,
        merge: &mut CalibratedMerge<'_>,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let mut model =
            self.with_plan(checkpoint, &Plan::keep(checkpoint.config()), "mean", &MergeOptions::default())?;
        for layer_idx in plan.changed_layers() {
            let weights = layer_weights(checkpoint, layer_idx)?;
            let heads = plan.layers().get(layer_idx).map_or(0, |choice| choice.num_key_value_heads());
            let merged = merge.merge_layer(layer_idx, heads, &weights, progress)?;
            model = model.with_layer(layer_idx, &attention_weights(&merged.weights, heads))?;
        }
        Ok(model)
    }
}

/// The attention weights of a layer as the checkpoint has them, widened to f32.
///
/// # Errors
/// [`Error::Missing`], [`Error::Checkpoint`].
pub fn layer_weights(checkpoint: &Checkpoint, layer_idx: usize) -> Result<LayerWeights> {
    let config = checkpoint.config();
    let read = |tensor: LayerTensor| -> Result<Vec<f32>> {
        let name = tensor.name();
        let info = checkpoint.tensor(&name).ok_or(Error::Missing { tensor: name })?;
        let mut values = vec![0.0; info.len()];
        checkpoint.read_f32(info, 0, &mut values)?;
        Ok(values)
    };
    let weight = |module| read(LayerTensor::weight(layer_idx, module));
    let bias = |module| config.has_bias(module).then(|| read(LayerTensor::bias(layer_idx, module))).transpose();
    Ok(LayerWeights {
        q_proj: weight(Module::QProj)?,
        k_proj: weight(Module::KProj)?,
        v_proj: weight(Module::VProj)?,
        o_proj: weight(Module::OProj)?,
        q_proj_bias: bias(Module::QProj)?,
        k_proj_bias: bias(Module::KProj)?,
        v_proj_bias: bias(Module::VProj)?,
    })
}

/// What a pass of the original stream through a layer left.
struct Visit {
    layer: StreamedLayer,
    /// None where statistics are saved.
    sample: Option<LayerSample>,
    /// What `o_proj` read of every sequence, for the refit.
    attention: Vec<Vec<f32>>,
}

/// All weights of a merged layer, for the forward pass.
#[must_use]
pub fn attention_weights(weights: &LayerWeights, num_key_value_heads: usize) -> AttentionWeights {
    AttentionWeights {
        num_key_value_heads,
        q_proj: Some(weights.q_proj.clone()),
        k_proj: weights.k_proj.clone(),
        v_proj: weights.v_proj.clone(),
        o_proj: Some(weights.o_proj.clone()),
        q_proj_bias: weights.q_proj_bias.clone(),
        k_proj_bias: weights.k_proj_bias.clone(),
        v_proj_bias: weights.v_proj_bias.clone(),
    }
}

/// The measurement for a measured cut. Where there is nothing to measure on, the cut follows from the target contexts.
fn measurement(
    weights: &LayerWeights,
    geometry: &LayerGeometry,
    sample: &LayerSample,
    options: &ClosedFormOptions,
    calibration: &Calibration,
) -> std::result::Result<(Option<Measurement>, ClosedFormOptions), mqadapt_merge::Error> {
    if options.cut != Cut::Measured || geometry.qk_norm {
        return Ok((None, options.clone()));
    }
    if sample.inputs.iter().all(Vec::is_empty) {
        let cut = Cut::Context(calibration.target_contexts.clone());
        return Ok((None, ClosedFormOptions { cut, ..options.clone() }));
    }
    Ok((Some(Measurement::new(weights, geometry, sample.inputs.clone())?), options.clone()))
}

/// Most bytes of one layer's sums, unless a plan needs more.
const STATISTICS_BYTES: usize = 1 << 30;

/// K/V heads whose joint moments are kept: all of them where that is no more than a gigabyte, else the most that is,
/// and in any case the `members` that a plan merges at a time.
pub(crate) fn block_heads(geometry: &LayerGeometry, members: usize) -> usize {
    let fits = |block: &usize| {
        let shape = StatisticsShape::new(geometry, Some(*block));
        *block <= members || shape.is_ok_and(|shape| shape.bytes() <= STATISTICS_BYTES)
    };
    let (kv, members) = (geometry.num_key_value_heads, members.max(1));
    let mut blocks = (1..=kv).rev().filter(|block| kv.is_multiple_of(*block) && block.is_multiple_of(members));
    blocks.find(fits).unwrap_or(kv)
}

/// Sums the statistics of one layer while a stream goes through it.
pub(crate) struct Collector {
    layer_idx: usize,
    sums: Accumulator,
    wanted: Vec<(usize, usize)>,
    inputs: Vec<Vec<f32>>,
    hidden_size: usize,
}

impl Collector {
    pub(crate) fn new(
        geometry: &LayerGeometry,
        o_proj: &[f32],
        calibration: &Calibration,
        layer_idx: usize,
        block_heads: usize,
    ) -> Result<Self> {
        let sums = Accumulator::new(geometry.clone(), o_proj, Some(block_heads))
            .map_err(|source| Error::Merge { layer_idx, source })?;
        let wanted = if geometry.qk_norm { Vec::new() } else { calibration.measured() };
        let inputs = vec![Vec::new(); wanted.len()];
        Ok(Self { layer_idx, sums, wanted, inputs, hidden_size: geometry.hidden_size })
    }

    pub(crate) fn add(&mut self, trace: &crate::LayerTrace<'_>) -> Result<()> {
        for ((sequence, tokens), input) in self.wanted.iter().zip(&mut self.inputs) {
            if *sequence == trace.sequence {
                input.extend_from_slice(&trace.attention_input[..tokens * self.hidden_size]);
            }
        }
        let added = self.sums.add_sequence(trace.q, trace.k, trace.v);
        added.map(drop).map_err(|source| Error::Merge { layer_idx: self.layer_idx, source })
    }

    pub(crate) fn finish(self) -> LayerSample {
        LayerSample { statistics: self.sums.finish(), inputs: self.inputs }
    }
}
