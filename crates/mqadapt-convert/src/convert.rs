//! A conversion from beginning to end: check everything, plan all output, move the bytes, write what describes them.

use std::path::Path;
use std::time::Instant;

use mqadapt_checkpoint::{Checkpoint, Content, SideFile, StoredType};
use mqadapt_compress::LayerMethod;
use mqadapt_core::{DType, ModelConfig, Plan, Progress, cost};
use serde_json::{Map, Value, json};

use crate::file_names::{INDEX_FILE, MANIFEST_FILE};
use crate::layout::{Layout, Request};
use crate::manifest::{Manifest, PlanRecord, SourceRecord};
use crate::options::peak_rss_bytes;
use crate::output::Output;
use crate::resume::journal::Journal;
use crate::transfer::{LayerNotes, Moved, PHASE, Transfer, Writer};
use crate::{ConversionReport, ConvertOptions, Error, Result};

/// Bytes besides the tensors that have to fit the disk: configuration, manifest, journal.
const SLACK: u64 = 1 << 20;

/// Converts a checkpoint into a new folder.
///
/// Progress is reported in bytes written, phase `convert`. The folder appears under its name only when it is complete: until
/// then it is called `DST.mqadapt-partial`. After an error it is removed, unless `options.resume` asks to keep it.
///
/// # Errors
/// The [`Error`] that applies; the output is then absent or, after a kill or with `options.resume`, unfinished and resumable.
pub fn convert(
    checkpoint: &Checkpoint,
    dst: &Path,
    plan: &Plan,
    options: &ConvertOptions,
    progress: &dyn Progress,
) -> Result<ConversionReport> {
    if options.method.rows().is_none() {
        let detail = "needs statistics of calibration text".to_owned();
        return Err(Error::Method { method: options.method.name.to_owned(), detail });
    }
    run(checkpoint, dst, plan, options, None, progress)
}

/// Converts a checkpoint by a method that needs whole layers. Otherwise as [`convert`].
///
/// # Errors
/// As [`convert`], and [`Error::Method`] when `layers` fails.
pub fn convert_layers(
    checkpoint: &Checkpoint,
    dst: &Path,
    plan: &Plan,
    options: &ConvertOptions,
    layers: &mut dyn LayerMethod,
    progress: &dyn Progress,
) -> Result<ConversionReport> {
    run(checkpoint, dst, plan, options, Some(layers), progress)
}

fn run(
    checkpoint: &Checkpoint,
    dst: &Path,
    plan: &Plan,
    options: &ConvertOptions,
    layers: Option<&mut dyn LayerMethod>,
    progress: &dyn Progress,
) -> Result<ConversionReport> {
    let begun = Instant::now();
    options.target.check(checkpoint.config(), plan).map_err(|detail| {
        let target = options.target.name();
        Error::Target { target, detail }
    })?;
    let planned = planned_config(checkpoint, plan, options);
    let whole_layers = layers.is_some();
    let layout = Layout::new(Request { checkpoint, planned: &planned, plan, options, whole_layers })?;
    let side_files = checkpoint.side_files()?;
    let target_files = options.target.files(&planned);
    let files = file_names(&layout, &side_files, &target_files);
    let job = job(checkpoint, plan, options);
    let (output, resumed) = Output::begin(checkpoint, dst, &files, &job, options)?;
    let (mut journal, past) = Journal::open(output.work(), &job, &files, resumed, options.sync)?;
    let side_bytes: u64 = side_files.iter().map(SideFile::bytes).sum();
    output.check_space((layout.bytes() + side_bytes + SLACK).saturating_sub(output.bytes_there()))?;

    let mut transfer = Transfer::new(checkpoint, plan, options, output.work(), layout.bytes(), progress);
    transfer.verify(&layout, &past)?;
    let notes = match layers {
        Some(layers) => {
            let notes = transfer.layers(&layout, &past, &mut journal, layers)?;
            journal.layers(output.work().path(), &past, &notes.xxh3_128)?;
            notes
        }
        None => LayerNotes::default(),
    };
    let mut moved = transfer.run(&layout, &past, Writer::start(journal, options.sync))?;
    let (bytes_read, not_finite) = (moved.bytes_read, moved.not_finite.clone());
    let redone = std::mem::take(&mut moved.notes);

    let mut bytes_written = layout.bytes();
    for file in &side_files {
        bytes_written += match &file.content {
            Content::File(path) => output.copy(&file.name, path, || {
                Ok(progress.advance(PHASE, layout.bytes(), layout.bytes())?) // an interrupt is noticed here
            })?,
            Content::Bytes(bytes) => output.write(&file.name, bytes)?,
        };
    }
    for (name, content) in &target_files {
        bytes_written += output.write(name, content.as_bytes())?;
    }
    let manifest = manifest(checkpoint, plan, options, moved, notes, files)?;
    bytes_written += output.write(MANIFEST_FILE, manifest.to_json().as_bytes())?;
    if let Some(index) = &layout.index {
        bytes_written += output.write(INDEX_FILE, index.as_bytes())?;
    }
    refuse_changed_source(checkpoint)?;
    output.commit()?;
    Ok(ConversionReport {
        manifest,
        bytes_read,
        bytes_written,
        seconds: begun.elapsed().as_secs_f64(),
        not_finite,
        peak_rss_bytes: peak_rss_bytes(),
        redone,
    })
}

/// The names of all files that are written, in order.
fn file_names(layout: &Layout, side_files: &[SideFile], target_files: &[(&str, String)]) -> Vec<String> {
    let mut names: Vec<String> = layout.shards.iter().map(|shard| shard.name.clone()).collect();
    names.extend(side_files.iter().map(|file| file.name.clone()));
    names.extend(target_files.iter().map(|(name, _)| (*name).to_owned()));
    names.push(MANIFEST_FILE.to_owned());
    names.extend(layout.index.is_some().then(|| INDEX_FILE.to_owned()));
    names.sort_unstable();
    names
}

/// The configuration of the result.
fn planned_config(checkpoint: &Checkpoint, plan: &Plan, options: &ConvertOptions) -> ModelConfig {
    let quantised = checkpoint.tensors().iter().any(|tensor| matches!(tensor.dtype, StoredType::Ggml(_)));
    let dtype = options.dtype.or_else(|| quantised.then(|| checkpoint.dtype()));
    options.target.config(checkpoint.config(), plan, dtype)
}

/// Everything that the written bytes depend on: a conversion is continued only by the same job.
fn job(checkpoint: &Checkpoint, plan: &Plan, options: &ConvertOptions) -> Value {
    let file = |shard: &mqadapt_checkpoint::Shard| json!([shard.name(), shard.bytes(), shard.tag()]);
    json!({
        "mqadapt_version": env!("CARGO_PKG_VERSION"),
        "source": source_name(checkpoint, options),
        "source identity": checkpoint.identity(),
        "source files": checkpoint.shards().iter().map(file).collect::<Vec<_>>(),
        "plan": plan.num_key_value_heads(),
        "method": options.method.name,
        "options": merge_options(options),
        "dtype": options.dtype.map(DType::name),
        "max_shard_size": options.max_shard_size,
    })
}

fn source_name(checkpoint: &Checkpoint, options: &ConvertOptions) -> String {
    options.source_name.clone().unwrap_or_else(|| checkpoint.path().display().to_string())
}

fn merge_options(options: &ConvertOptions) -> Map<String, Value> {
    let pairs = [("seed", json!(options.merge.seed)), ("initializer_range", json!(options.merge.initializer_range))];
    let told = options.method_options.clone();
    pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).chain(told).collect()
}

fn manifest(
    checkpoint: &Checkpoint,
    plan: &Plan,
    options: &ConvertOptions,
    moved: Moved,
    notes: LayerNotes,
    files: Vec<String>,
) -> Result<Manifest> {
    let config = checkpoint.config();
    let keep = Plan::keep(config);
    let dtype = options.dtype.unwrap_or(checkpoint.dtype());
    let mut relative_error = moved.relative_error;
    for (layer, error) in relative_error.iter_mut().enumerate() {
        *error = notes.relative_error.get(&layer).copied().unwrap_or(*error);
    }
    Ok(Manifest {
        format_version: 1,
        mqadapt_version: env!("CARGO_PKG_VERSION").to_owned(),
        source: SourceRecord { name: source_name(checkpoint, options), fingerprint: checkpoint.fingerprint()? },
        plan: PlanRecord { num_key_value_heads: plan.num_key_value_heads() },
        method: options.method.name.to_owned(),
        options: merge_options(options),
        dtype: options.dtype.map_or(checkpoint.stored_dtype(), DType::name).to_owned(),
        num_key_value_heads_before: config.num_key_value_heads.clone(),
        num_key_value_heads_after: plan.num_key_value_heads(),
        relative_error,
        layers: notes.notes,
        kv_bytes_per_token_before: cost::kv_bytes_per_token(config, &keep, dtype.bytes()),
        kv_bytes_per_token_after: cost::kv_bytes_per_token(config, plan, dtype.bytes()),
        parameters_before: cost::parameters(config, &keep),
        parameters_after: cost::parameters(config, plan),
        shards: moved.shards,
        files,
    })
}

/// A source that was written to while it was read gave a mixture.
fn refuse_changed_source(checkpoint: &Checkpoint) -> Result<()> {
    for shard in checkpoint.shards() {
        if let Some(detail) = shard.change()? {
            return Err(Error::SourceChanged { path: shard.path().to_owned(), detail });
        }
    }
    Ok(())
}
