//! Moving the bytes: shard by shard in order, long runs of untouched tensors in one go, touched ones in pieces.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use mqadapt_checkpoint::{Checkpoint, TensorInfo, round};
use mqadapt_core::family::LayerTensor;
use mqadapt_core::{DType, Plan, Progress};
use mqadapt_merge::{ErrorSum, KvMerge};
use serde_json::{Map, Value};
use xxhash_rust::xxh3::Xxh3;

use crate::follower::{Follower, Following};
use crate::journal::{Learnt, Mark, MergedTensor, Past};
use crate::layers::{LayerMerge, LayerWeights, MergedLayer};
use crate::layout::{How, Layout, OutputShard, OutputTensor};
use crate::steps::{Step, Work, steps};
use crate::transfer::{Transfer, write_all_at};
use crate::{ConvertOptions, Error, Result, ShardRecord, cache};

/// Bytes between two places to continue from.
const MARK_EVERY: u64 = 256 << 20;
/// Bytes of the source that the system is asked to read in advance.
const READ_AHEAD: u64 = 16 << 20;
/// The phase that progress is reported under; its unit is bytes written.
pub(crate) const PHASE: &str = "convert";

/// Moves the bytes of one conversion.
pub(crate) struct Engine<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a Plan,
    options: &'a ConvertOptions,
    work: &'a Path,
    progress: &'a dyn Progress,
    total: u64,
    done: u64,
    bytes_read: u64,
    transfer: Transfer,
    /// Bytes computed at a time.
    piece: usize,
    /// Per layer.
    errors: Vec<ErrorSum>,
    /// Since the last mark.
    learnt: Learnt,
    /// The source shard that is being read.
    reading: Option<usize>,
}

/// What is known when all bytes are moved.
pub(crate) struct Moved {
    pub shards: Vec<ShardRecord>,
    pub relative_error: Vec<f64>,
    pub bytes_read: u64,
}

/// What a method that needs whole layers said of them.
#[derive(Debug, Default)]
pub(crate) struct LayerNotes {
    pub relative_error: BTreeMap<usize, f64>,
    pub notes: Map<String, Value>,
    /// XXH3 (128 bits) of the merged weights as they are stored: a resumed conversion must get the same again.
    pub xxh3_128: String,
}

/// A file that is being written.
#[derive(Clone, Copy)]
struct Destination<'a> {
    file: &'a File,
    path: &'a Path,
}

impl<'a> Engine<'a> {
    pub fn new(
        checkpoint: &'a Checkpoint,
        plan: &'a Plan,
        options: &'a ConvertOptions,
        work: &'a Path,
        total: u64,
        progress: &'a dyn Progress,
    ) -> Self {
        // a dozen pieces are on their way to the second thread; copying has a buffer of that size, merging two of its own
        let piece = usize::try_from(options.max_memory / 32).unwrap_or(usize::MAX).clamp(64 << 10, 1 << 20) / 8 * 8;
        Self {
            checkpoint,
            plan,
            options,
            work,
            progress,
            total,
            done: 0,
            bytes_read: 0,
            transfer: Transfer::new(piece),
            piece,
            errors: vec![ErrorSum::default(); checkpoint.config().num_hidden_layers],
            learnt: Learnt::default(),
            reading: None,
        }
    }

    /// Moves everything, or what `past` has left of it.
    pub fn run(mut self, layout: &Layout, past: &Past, mut follower: Follower) -> Result<Moved> {
        let mut earlier = Vec::new();
        if let Err(error) = self.shards(layout, past, &mut follower, &mut earlier) {
            if self.options.resume && !matches!(error, Error::Interrupted(_)) {
                let _ = follower.finish(|| Ok(())); // so that what is complete counts as complete
            }
            return Err(error);
        }
        let (progress, done, total) = (self.progress, self.done, self.total);
        let mut shards = follower.finish(|| Ok(progress.advance(PHASE, done, total)?))?;
        shards.append(&mut earlier);
        shards.sort_by_key(|record| layout.shards.iter().position(|shard| shard.name == record.name));
        let relative_error = self.errors.iter().map(ErrorSum::relative).collect();
        Ok(Moved { shards, relative_error, bytes_read: self.bytes_read })
    }

    fn shards(
        &mut self,
        layout: &Layout,
        past: &Past,
        follower: &mut Follower,
        earlier: &mut Vec<ShardRecord>,
    ) -> Result<()> {
        for shard in &layout.shards {
            if let Some(record) = self.completed_before(shard, past) {
                self.remember(past.marks(&shard.name));
                self.advance(shard.bytes)?;
                earlier.push(record);
            } else {
                self.shard(shard, past.marks(&shard.name), follower)?;
            }
        }
        Ok(())
    }

    /// Puts the layers of a method that needs them whole into their places, before the rest is streamed around them.
    pub fn layers(&mut self, layout: &Layout, past: &Past, method: &mut dyn LayerMerge) -> Result<LayerNotes> {
        let mut out = LayerNotes::default();
        let mut hash = Xxh3::new();
        let complete: HashSet<&str> = layout
            .shards
            .iter()
            .filter(|s| self.completed_before(s, past).is_some())
            .map(|s| s.name.as_str())
            .collect();
        for layer_idx in 0..self.checkpoint.config().num_hidden_layers {
            let places: Vec<_> =
                layout.shards.iter().flat_map(|shard| shard.of_layer(layer_idx).map(move |t| (shard, t))).collect();
            if places.is_empty() {
                continue;
            }
            self.progress.advance(PHASE, self.done, self.total)?;
            let mut merged = self.merged_layer(layer_idx, &places, method)?;
            for (shard, tensor) in places {
                let write = !complete.contains(shard.name.as_str());
                self.put(shard, tensor, &mut merged.weights, write, &mut hash)?;
            }
            self.checkpoint.shards().iter().for_each(mqadapt_checkpoint::Shard::release);
            out.relative_error.insert(layer_idx, merged.relative_error);
            out.notes.insert(layer_idx.to_string(), merged.notes);
        }
        out.xxh3_128 = format!("{:032x}", hash.digest128());
        Ok(out)
    }

    /// Reads a layer and has it merged.
    fn merged_layer(
        &mut self,
        layer_idx: usize,
        places: &[(&OutputShard, &OutputTensor)],
        method: &mut dyn LayerMerge,
    ) -> Result<MergedLayer> {
        let mut weights = LayerWeights::new();
        for (_, place) in places {
            let source = self.source(place.source)?;
            let mut values = vec![0.0; source.len()];
            self.checkpoint.read_f32(source, 0, &mut values)?;
            self.bytes_read += source.bytes;
            weights.insert(source.name.clone(), values);
        }
        let heads = self.plan.layers().get(layer_idx).map_or(0, |choice| choice.num_key_value_heads());
        let failed = |detail| Error::Method { method: self.options.method.name.to_owned(), detail };
        let merged = method.merge_layer(layer_idx, heads, weights).map_err(failed)?;
        for (_, place) in places {
            let name = &self.source(place.source)?.name;
            let expected = place.shape.iter().product::<usize>();
            match merged.weights.get(name) {
                Some(values) if values.len() == expected => {}
                found => {
                    let found = found.map_or_else(|| "nothing".to_owned(), |values| format!("{} values", values.len()));
                    return Err(failed(format!("gave {found} for '{name}', which takes {expected}")));
                }
            }
        }
        Ok(merged)
    }

    /// Rounds and hashes one merged tensor of a layer, and writes it into the unfinished file of its shard.
    fn put(
        &mut self,
        shard: &OutputShard,
        tensor: &OutputTensor,
        weights: &mut LayerWeights,
        write: bool,
        hash: &mut Xxh3,
    ) -> Result<()> {
        let name = &self.source(tensor.source)?.name;
        let (Some(values), Some(dtype)) = (weights.get_mut(name), tensor.dtype.float()) else { return Ok(()) };
        let path = partial(&self.work.join(&shard.name));
        let file = if write { Some(open_output(&path)?) } else { None };
        let mut at = tensor.offset;
        for values in values.chunks_mut(self.piece / 4) {
            let mut out = vec![0; values.len() * dtype.bytes()];
            refuse_overflow(name, dtype, round(values, dtype, &mut out))?;
            hash.update(&out);
            if let Some(file) = &file {
                write_all_at(file, &path, at, &out)?;
            }
            at += out.len() as u64;
        }
        Ok(())
    }

    /// The record of a shard that an earlier run completed.
    fn completed_before(&self, shard: &OutputShard, past: &Past) -> Option<ShardRecord> {
        let last = past.marks(&shard.name).last().filter(|mark| mark.complete && mark.bytes == shard.bytes)?;
        let there = fs::metadata(self.work.join(&shard.name)).is_ok_and(|metadata| metadata.len() == shard.bytes);
        there.then(|| ShardRecord { name: last.shard.clone(), bytes: last.bytes, xxh3_128: last.xxh3_128.clone() })
    }

    fn shard(&mut self, shard: &OutputShard, marks: &[Mark], follower: &mut Follower) -> Result<()> {
        let following = self.continued(shard, marks)?;
        let (file, path) = (Arc::clone(&following.file), following.partial.clone());
        let to = Destination { file: &file, path: &path };
        let begun = following.hashed;
        let mut marked = begun;
        self.advance(begun)?;
        follower.begin(following)?;
        if begun == 0 {
            follower.data(shard.header.clone())?;
            self.advance(shard.header.len() as u64)?;
        }
        for step in steps(shard, self.checkpoint).iter().filter(|step| step.end > begun) {
            self.step(step, to, follower)?;
            follower.written(step.end)?;
            if step.end - marked >= MARK_EVERY {
                marked = step.end;
                follower.mark(std::mem::take(&mut self.learnt))?;
            }
        }
        if shard.ends_source {
            self.done_reading()?;
        }
        follower.complete(std::mem::take(&mut self.learnt))
    }

    fn step(&mut self, step: &Step, to: Destination<'_>, follower: &mut Follower) -> Result<()> {
        let bytes = step.end - step.start;
        self.read_from(step)?;
        match step.work {
            Work::Copy { shard, offset } => {
                let Some(from) = self.checkpoint.shards().get(shard) else { return Ok(()) };
                cache::will_need(&*from.file()?, offset + bytes, offset + bytes + READ_AHEAD);
                self.transfer.copy(from, offset, to.file, to.path, step.start, bytes)?;
                self.bytes_read += bytes;
                self.advance(bytes)
            }
            Work::Read { tensor, first_value, dtype } => {
                let source = self.source(tensor)?;
                let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
                let mut first_value = first_value;
                while left > 0 {
                    let mut out = follower.buffer(left.min(self.piece));
                    refuse_overflow(
                        &source.name,
                        dtype,
                        self.checkpoint.read_as(source, dtype, first_value, &mut out)?,
                    )?;
                    first_value += out.len() / dtype.bytes();
                    left -= out.len();
                    follower.data(out)?;
                }
                self.bytes_read += source.bytes * bytes / (source.len().max(1) * dtype.bytes()) as u64;
                self.advance(bytes)
            }
            Work::Merge { tensor, layer, dtype } => self.merge(tensor, layer, dtype, follower),
            Work::Skip => self.advance(bytes),
        }
    }

    /// Gives the source shard back that the steps before were read from, if this one needs another.
    fn read_from(&mut self, step: &Step) -> Result<()> {
        let next = match step.work {
            Work::Copy { shard, .. } => Some(shard),
            Work::Read { tensor, .. } | Work::Merge { tensor, .. } => Some(self.source(tensor)?.shard),
            Work::Skip => self.reading,
        };
        if next != self.reading {
            self.done_reading()?;
            self.reading = next;
        }
        Ok(())
    }

    /// Gives the source shard back that was read from, after sampling it for the fingerprint.
    fn done_reading(&mut self) -> Result<()> {
        let Some(number) = self.reading.take() else { return Ok(()) };
        self.learnt.samples.push((number, self.checkpoint.sample_shard(number)?.to_owned()));
        if let Some(shard) = self.checkpoint.shards().get(number) {
            shard.release();
        }
        Ok(())
    }

    /// Merges the heads of one tensor, in pieces.
    fn merge(&mut self, tensor: usize, layer: LayerTensor, dtype: DType, follower: &mut Follower) -> Result<()> {
        let source = self.source(tensor)?;
        let config = self.checkpoint.config();
        let rows = self.options.method.rows();
        let Some(merge) = rows.and_then(|rows| KvMerge::of(layer, config, self.plan, rows, &self.options.merge)) else {
            return Ok(()); // the layout has merges only where there is one
        };
        let read = |first: usize, out: &mut [f32]| Ok(self.checkpoint.read_f32(source, first, out)?);
        let (piece, progress, total) = (self.piece, self.progress, self.total);
        let done = &mut self.done;
        let write = |_: usize, merged: &mut [f32]| {
            for values in merged.chunks_mut(piece / 4) {
                let mut out = follower.buffer(values.len() * dtype.bytes());
                refuse_overflow(&source.name, dtype, round(values, dtype, &mut out))?;
                *done += out.len() as u64;
                follower.data(out)?;
            }
            Ok(progress.advance(PHASE, *done, total)?)
        };
        let error = merge.run::<Error>(read, write)?;
        self.bytes_read += source.bytes;
        if let Some(sum) = self.errors.get_mut(layer.layer_idx) {
            sum.merge(error);
        }
        let (error, energy) = error.parts();
        let (error_bits, energy_bits) = (error.to_bits(), energy.to_bits());
        self.learnt.merged.push(MergedTensor { layer_idx: layer.layer_idx, error_bits, energy_bits });
        Ok(())
    }

    /// The unfinished file of a shard, and how much of it is known to be right: up to the last mark whose checksum the
    /// file still has (after a power failure, it may not have what was written last).
    fn continued(&mut self, shard: &OutputShard, marks: &[Mark]) -> Result<Following> {
        let path = self.work.join(&shard.name);
        let partial = partial(&path);
        if !marks.is_empty() && path.exists() && !partial.exists() {
            // killed between the last rename and the line in the journal
            fs::rename(&path, &partial).map_err(Error::io("rename", &path))?;
        }
        let file = open_output(&partial)?;
        let len = file.metadata().map_err(Error::io("open", &partial))?.len();
        let fresh = |hashed, hash| Following {
            name: shard.name.clone(),
            file: Arc::new(file),
            partial: partial.clone(),
            path,
            hashed,
            hash,
        };
        let mut trusted = fresh(0, Box::new(Xxh3::new()));
        let mut known = 0;
        let mut piece = vec![0; 256 << 10];
        for (at, mark) in marks.iter().enumerate() {
            if mark.bytes > len || mark.bytes > shard.bytes || mark.bytes < trusted.hashed {
                break;
            }
            let before = (trusted.hashed, trusted.hash.clone());
            trusted.follow(mark.bytes, &mut piece, &AtomicBool::new(false))?;
            self.progress.advance(PHASE, self.done + trusted.hashed, self.total)?;
            if trusted.digest() != mark.xxh3_128 {
                (trusted.hashed, trusted.hash) = before;
                break;
            }
            known = at + 1;
        }
        self.remember(marks.get(..known).unwrap_or(&[]));
        Ok(trusted)
    }

    /// Takes what was learnt before from the journal.
    fn remember(&mut self, marks: &[Mark]) {
        for (number, sample) in marks.iter().flat_map(|mark| &mark.samples) {
            self.checkpoint.remember_sample(*number, sample);
        }
        for merged in marks.iter().flat_map(|mark| &mark.merged) {
            if let Some(sum) = self.errors.get_mut(merged.layer_idx) {
                let parts = (f64::from_bits(merged.error_bits), f64::from_bits(merged.energy_bits));
                sum.merge(ErrorSum::from_parts(parts));
            }
        }
    }

    fn source(&self, at: usize) -> Result<&'a TensorInfo> {
        let none = || Error::Method { method: self.options.method.name.to_owned(), detail: format!("no tensor {at}") };
        self.checkpoint.tensors().get(at).ok_or_else(none)
    }

    fn advance(&mut self, bytes: u64) -> Result<()> {
        self.done += bytes;
        Ok(self.progress.advance(PHASE, self.done, self.total)?)
    }
}

impl OutputShard {
    /// The tensors that a layer method gives for this layer.
    fn of_layer(&self, layer_idx: usize) -> impl Iterator<Item = &OutputTensor> {
        self.tensors
            .iter()
            .filter(move |tensor| matches!(tensor.how, How::Layer(layer) if layer.layer_idx == layer_idx))
    }
}

/// The name of a shard while it is unfinished.
fn partial(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    path.with_file_name(name)
}

fn open_output(path: &Path) -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).open(path).map_err(Error::io("create", path))
}

fn refuse_overflow(name: &str, dtype: DType, count: u64) -> Result<()> {
    if count == 0 { Ok(()) } else { Err(Error::Overflow { name: name.to_owned(), dtype: dtype.name(), count }) }
}
