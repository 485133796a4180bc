//! The layers of a checkpoint merged one by one, while the original and the converted residual stream run along.

use std::path::PathBuf;

use mqadapt_checkpoint::Checkpoint;
use mqadapt_compress::closed_form::Fallback;
use mqadapt_compress::{LayerJob, LayerMerge, LayerWeights, Method, REFIT_LAMBDA};
use mqadapt_core::{AttentionShape, DType, LayerCache, Progress, Progressing};

use crate::calibration::Calibration;
use crate::collector::Collector;
use crate::layer_pass::{CalibratedLayer, LayerPass};
use crate::refine::refined;
use crate::refit::Refitting;
use crate::statistics_file::StatisticsFile;
use crate::weights::attention;
use crate::weights::qk_norm;
use crate::{CalibrationOptions, Error, Result};
use mqadapt_model::return_freed_memory;
use mqadapt_model::{Activations, Spill};
use mqadapt_model::{CALIBRATE, StreamedLayer, embed};

/// Bytes of sums from which on freed memory is given back between the phases of a merge; below, taking it again costs more
/// time than it is worth.
const LARGE_BYTES: usize = 64 << 20;

/// Runs the original layer, and the converted one beside it, over the calibration text.
struct Streams {
    /// The layer they are about to enter.
    layer_idx: usize,
    original: Activations,
    /// None while nothing has been converted.
    converted: Option<Activations>,
}

/// Merges the layers of a checkpoint, one by one in ascending order.
pub struct CalibratedMerge<'a> {
    checkpoint: &'a Checkpoint,
    calibration: Calibration,
    method: &'static dyn LayerMerge,
    options: CalibrationOptions,
    /// Saved statistics; they replace the pass over the text unless the method is sequential.
    saved: Option<StatisticsFile>,
    /// Type that converted weights will be written in.
    dtype: DType,
    spill: Option<Spill>,
    streams: Option<Streams>,
}

impl<'a> CalibratedMerge<'a> {
    /// Without `saved` statistics the text has to have tokens; `dtype` is that of the converted weights.
    ///
    /// # Errors
    /// [`Error::Argument`] where there is neither text nor statistics, or a target context is longer than their longest window;
    /// [`Error::Statistics`] where these are of another model.
    pub fn new(
        checkpoint: &'a Checkpoint,
        calibration: Calibration,
        method: &'static Method,
        options: CalibrationOptions,
        saved: Option<StatisticsFile>,
        dtype: DType,
    ) -> Result<Self> {
        let Some(layer) = method.layer() else {
            let detail = format!("'{}' reads no text; give it none", method.name);
            return Err(Error::Argument { name: "method", detail });
        };
        if let Some(option) = options.given().iter().find(|option| !method.options().contains(option)) {
            let detail = format!("is no option of the method '{}'; leave it out", method.name);
            return Err(Error::Argument { name: option.name(), detail });
        }
        let family = checkpoint.config().family;
        if !family.runnable {
            let detail = format!(
                "'{}' runs the model over a text, and the family {} cannot be run here; use mean, first or random",
                method.name, family.model_type
            );
            return Err(Error::Argument { name: "method", detail });
        }
        let (method, sequential) = (layer, options.is_sequential());
        let empty = calibration.sequences.iter().all(Vec::is_empty);
        if empty && (saved.is_none() || sequential) {
            let detail = if saved.is_some() {
                "has no tokens, and saved statistics do not replace them where the method is sequential or refines"
                    .to_owned()
            } else {
                "has no tokens; give a text of a few thousand".to_owned()
            };
            return Err(Error::Argument { name: "calibration", detail });
        }
        if let Some(saved) = &saved {
            saved.check_model(&checkpoint.fingerprint()?)?;
        }
        let lengths = if empty { saved.as_ref().map(StatisticsFile::lengths) } else { Some(calibration.lengths()) };
        calibration.check_target_contexts(&lengths.unwrap_or_default())?;
        Ok(Self { checkpoint, calibration, method, options, saved, dtype, spill: None, streams: None })
    }

    fn sequential(&self) -> bool {
        self.options.is_sequential()
    }

    fn progressing<'p>(&self, layer_idx: usize, progress: &'p dyn Progress) -> Progressing<'p> {
        let total = self.checkpoint.config().num_hidden_layers as u64;
        Progressing { progress, phase: CALIBRATE, done: layer_idx as u64, total }
    }

    /// Lets activations go to a file where they are more than some memory holds.
    #[must_use]
    pub fn with_spill(self, spill: Spill) -> Self {
        Self { spill: Some(spill), ..self }
    }

    /// Merges layer `layer_idx`, whose weights these are, into what `cache` asks for. Layers must ascend from call to call.
    ///
    /// # Errors
    /// [`Error::Merge`], and what reading and running the layers before gives.
    pub fn merge_layer(
        &mut self,
        layer_idx: usize,
        cache: LayerCache,
        weights: &LayerWeights,
        progress: &dyn Progress,
    ) -> Result<CalibratedLayer> {
        let geometry = attention(self.checkpoint.config(), layer_idx)?;
        let failed = Error::merge(layer_idx);
        let progressing = self.progressing(layer_idx, progress);
        let sequential = self.sequential();
        if let Some(saved) = &self.saved {
            saved.check_weights(self.checkpoint, layer_idx, progress)?;
        }
        let mut run = None;
        if self.saved.is_none() || sequential {
            let members = geometry.num_key_value_heads / cache.num_key_value_heads().max(1);
            self.advance(layer_idx, progress)?;
            run = Some(self.visit(layer_idx, &geometry, weights, members, progress)?);
        }
        let mut sample = match (&self.saved, run.as_mut().and_then(|run| run.sample.take())) {
            (Some(saved), _) => saved.layer(layer_idx, &geometry)?,
            (None, Some(sample)) => sample,
            (None, None) => {
                return Err(Error::Argument { name: "calibration", detail: "gave no statistics".to_owned() });
            }
        };
        let large = sample.statistics.shape().bytes() > LARGE_BYTES;
        if large {
            return_freed_memory();
        }
        let (inputs, other_inputs) = sample.take_inputs_for(&self.calibration.target_contexts, geometry.hidden_size);
        let job = LayerJob {
            weights,
            shape: &geometry,
            cache,
            statistics: &sample.statistics,
            norms: qk_norm(self.checkpoint, layer_idx)?,
            inputs,
            other_inputs,
            target_contexts: &self.calibration.target_contexts,
            options: self.options.of_layer(self.dtype),
        };
        let (new, report) = self.method.merge(job, &progressing).map_err(failed)?;
        let mut merged = CalibratedLayer { weights: new, report, refit: None };
        drop(sample);
        if large {
            return_freed_memory();
        }
        if let (true, Some(run)) = (sequential, run) {
            self.refit(layer_idx, run, weights, &mut merged, progress)?;
        }
        Ok(merged)
    }

    /// Takes the streams through a layer that was merged before: `weights` as they were stored. Layers must ascend from call
    /// to call, here and in [`Self::merge_layer`].
    ///
    /// # Errors
    /// What reading and running the layers gives.
    pub fn resume_layer(
        &mut self,
        layer_idx: usize,
        cache: LayerCache,
        weights: &LayerWeights,
        progress: &dyn Progress,
    ) -> Result<()> {
        if !self.sequential() {
            return Ok(()); // no layer depends on those before it
        }
        self.advance(layer_idx, progress)?;
        let layer = StreamedLayer::load(self.checkpoint, layer_idx, progress)?;
        let converted = layer.with_attention(cache, weights, self.dtype)?;
        let Some(streams) = &mut self.streams else { return Ok(()) };
        if streams.converted.is_none() {
            streams.converted = Some(streams.original.duplicate()?);
        }
        layer.run(&mut streams.original, progress)?;
        if let Some(stream) = &mut streams.converted {
            converted.run(stream, progress)?;
        }
        streams.layer_idx += 1;
        Ok(())
    }

    /// The folder for activations, where they are more than may be held: the two streams and what `o_proj` reads.
    fn folder(&self) -> Option<PathBuf> {
        let spill = self.spill.as_ref()?;
        let config = self.checkpoint.config();
        let streams = if self.sequential() { 2 } else { 1 };
        let read = if self.sequential() { config.num_attention_heads * config.head_dim } else { 0 };
        let tokens: usize = self.calibration.sequences.iter().map(Vec::len).sum();
        let bytes = (4 * tokens * (streams * config.hidden_size + read)) as u64;
        (bytes > spill.max_memory).then(|| spill.folder.clone())
    }

    /// Takes the streams through the layers before `layer_idx`.
    fn advance(&mut self, layer_idx: usize, progress: &dyn Progress) -> Result<()> {
        let mut streams = match self.streams.take() {
            Some(streams) if streams.layer_idx <= layer_idx => streams,
            Some(streams) => {
                let detail = format!("follows layer {}; layers must ascend", streams.layer_idx);
                return Err(Error::Argument { name: "layer_idx", detail });
            }
            None => {
                let original = embed(self.checkpoint, &self.calibration.sequences, self.folder().as_deref())?;
                Streams { layer_idx: 0, original, converted: None }
            }
        };
        while streams.layer_idx < layer_idx {
            let layer = StreamedLayer::load(self.checkpoint, streams.layer_idx, progress)?;
            layer.run(&mut streams.original, progress)?;
            if let Some(converted) = &mut streams.converted {
                layer.run(converted, progress)?;
            }
            streams.layer_idx += 1;
        }
        self.streams = Some(streams);
        Ok(())
    }

    /// Takes the original stream through the layer, collecting what is not saved.
    fn visit(
        &mut self,
        layer_idx: usize,
        geometry: &AttentionShape,
        weights: &LayerWeights,
        members: usize,
        progress: &dyn Progress,
    ) -> Result<LayerPass> {
        let layer = StreamedLayer::load(self.checkpoint, layer_idx, progress)?;
        let (sequential, folder) = (self.sequential(), self.folder());
        let progressing = layer.progressing(progress);
        let Some(streams) = &mut self.streams else {
            return Err(Error::Argument { name: "layer_idx", detail: "has no residual stream".to_owned() });
        };
        if sequential && streams.converted.is_none() {
            streams.converted = Some(streams.original.duplicate()?);
        }
        let features = geometry.num_attention_heads * geometry.head_dim;
        let lengths = if sequential { streams.original.lengths().to_vec() } else { Vec::new() };
        let mut attention = Activations::new(lengths, features, folder.as_deref())?;
        let mut collector = match self.saved {
            Some(_) => None,
            None => Some(Collector::new(
                geometry,
                &weights.o_proj,
                &self.calibration,
                layer_idx,
                members,
                self.method.needs(),
            )?),
        };
        let mut look = |trace: &mqadapt_model::LayerTrace<'_>| {
            if sequential {
                attention.write(trace.sequence, trace.attention.to_vec())?;
            }
            collector.as_mut().map_or(Ok(()), |collector| collector.add(trace, &progressing))
        };
        layer.run_observed(&mut streams.original, &mut look, progress)?;
        streams.layer_idx += 1;
        let norms = qk_norm(self.checkpoint, layer_idx)?;
        Ok(LayerPass { geometry: geometry.clone(), norms, sample: collector.map(Collector::finish), attention })
    }

    /// Refits `o_proj` on the converted stream, and takes it through the converted layer.
    fn refit(
        &mut self,
        layer_idx: usize,
        mut run: LayerPass,
        original: &LayerWeights,
        merged: &mut CalibratedLayer,
        progress: &dyn Progress,
    ) -> Result<()> {
        let geometry = &run.geometry;
        // read again: the weights of its MLP are not held while the layer is merged
        let layer = StreamedLayer::load(self.checkpoint, layer_idx, progress)?;
        let progressing = layer.progressing(progress);
        let Some(stream) = self.streams.as_mut().and_then(|streams| streams.converted.as_mut()) else { return Ok(()) };
        let cache = LayerCache::heads(merged.report.num_key_value_heads);
        let refitting = Refitting { layer: &layer, geometry, original, cache, dtype: self.dtype };
        let sums = if let Some(refine) = &self.options.refine {
            let mut moved = refined(&layer, &run, stream, original, merged, refine, progress)?;
            moved.round_to(self.dtype);
            let mut of_moved = run.attention.like(geometry.num_attention_heads * geometry.head_dim)?;
            let after = refitting.sums(&moved, stream, &mut run.attention, Some(&mut of_moved), progress)?;
            let before = refitting.sums(&merged.weights, stream, &mut run.attention, None, progress)?;
            if after.error() < before.error() {
                merged.weights = moved;
                run.attention = of_moved;
                after
            } else {
                merged.report.fallbacks.push(Fallback::NotRefined);
                before
            }
        } else {
            refitting.sums(&merged.weights, stream, &mut run.attention, None, progress)?
        };
        // the refit changes `o_proj` alone, so what it reads is not computed again
        let refitted = sums.solve(REFIT_LAMBDA, self.dtype, &progressing).map_err(Error::merge(layer_idx))?;
        if refitted.error_after < refitted.error_before {
            merged.weights.o_proj = refitted.o_proj;
            merged.refit = Some((refitted.error_before, refitted.error_after));
        } else {
            merged.report.fallbacks.push(Fallback::NotRefitted);
            merged.refit = Some((refitted.error_before, refitted.error_before));
        }
        let converted = layer.with_attention(cache, &merged.weights, self.dtype)?;
        Ok(converted.leave(stream, &run.attention, progress)?)
    }
}
