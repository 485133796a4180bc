//! Moving the bytes: shard by shard in order, long runs of untouched tensors in one go, touched ones in pieces.
//!
//! This thread reads, computes and hashes; the [`Writer`]'s writes.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use mqadapt_checkpoint::{Checkpoint, StoredType, TensorInfo, not_finite, store};
use mqadapt_compress::{ErrorSum, KvMerge};
use mqadapt_core::family::LayerTensor;
use mqadapt_core::{Plan, Progress};

use crate::cache::Visit;
use crate::directory::Directory;
use crate::finite::FiniteScan;
use crate::journal::{Learnt, Mark, MergedTensor, Past};
use crate::layout::{Layout, OutputShard};
use crate::steps::{Step, Work, steps};
use crate::unfinished::{Completed, Unfinished, completed_before};
use crate::writer::{BUFFERS, Message, Writer};
use crate::{ConvertOptions, Error, Result, ShardRecord};

/// Bytes between two places to continue from.
const MARK_EVERY: u64 = 256 << 20;
/// Steps whose bytes the system is asked to read in advance.
const READ_AHEAD: usize = 4;
/// Most bytes handed over at a time. They stay in the second-level cache between reading and hashing: four times as many
/// take three times as long.
const PIECE: usize = 256 << 10;
/// The phase that progress is reported under; its unit is bytes written.
pub(crate) const PHASE: &str = "convert";

/// Moves the bytes of one conversion.
pub(crate) struct Engine<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) plan: &'a Plan,
    pub(crate) options: &'a ConvertOptions,
    pub(crate) work: &'a Arc<Directory>,
    pub(crate) progress: &'a dyn Progress,
    total: u64,
    /// Shards that an earlier run has completed and that are as it wrote them, by name.
    pub(crate) complete: HashMap<String, ShardRecord>,
    /// Bytes that an earlier run has written: those of complete shards, and of the others up to here.
    before: u64,
    /// What of an earlier run was damaged and is done again, a sentence each.
    pub(crate) notes: Vec<String>,
    pub(crate) bytes_read: u64,
    /// Bytes handed over at a time.
    pub(crate) piece: usize,
    /// Per layer.
    errors: Vec<ErrorSum>,
    /// Since the last mark.
    learnt: Learnt,
    /// What is copied although it is not finite.
    scan: FiniteScan,
    /// The source shard that is being read.
    reading: Option<usize>,
}

/// What is known when all bytes are moved.
pub(crate) struct Moved {
    pub shards: Vec<ShardRecord>,
    pub relative_error: Vec<f64>,
    pub bytes_read: u64,
    /// Values copied by this run that are not finite, by tensor.
    pub not_finite: BTreeMap<String, u64>,
    /// What of an earlier run was damaged and was done again, a sentence each.
    pub notes: Vec<String>,
}

impl<'a> Engine<'a> {
    pub fn new(
        checkpoint: &'a Checkpoint,
        plan: &'a Plan,
        options: &'a ConvertOptions,
        work: &'a Arc<Directory>,
        total: u64,
        progress: &'a dyn Progress,
    ) -> Self {
        // the writer's buffers, and those that merging takes, which are as large
        let piece = usize::try_from(options.max_memory / (2 * BUFFERS) as u64).unwrap_or(PIECE);
        let piece = piece.clamp(64 << 10, PIECE) / 8 * 8;
        Self {
            checkpoint,
            plan,
            options,
            work,
            progress,
            total,
            complete: HashMap::new(),
            before: 0,
            notes: Vec::new(),
            bytes_read: 0,
            piece,
            errors: vec![ErrorSum::default(); checkpoint.config().num_hidden_layers],
            learnt: Learnt::default(),
            scan: FiniteScan::default(),
            reading: None,
        }
    }

    /// Compares what an earlier run has completed with its checksums.
    pub fn verify(&mut self, layout: &Layout, past: &Past) -> Result<()> {
        self.notes.extend(past.damage().map(str::to_owned));
        for shard in &layout.shards {
            let (work, marks) = (Arc::clone(self.work), past.marks(&shard.name));
            match completed_before(&work, shard, marks, |hashed| self.report(hashed))? {
                Completed::Whole(record) => {
                    self.before += shard.bytes;
                    self.complete.insert(shard.name.clone(), record);
                }
                Completed::Damaged => {
                    let path = work.path().join(&shard.name);
                    self.notes
                        .push(format!("{}: is damaged (its checksum is wrong) and is written again", path.display()));
                }
                Completed::No => {}
            }
        }
        Ok(())
    }

    /// Moves everything, or what `past` has left of it.
    pub fn run(mut self, layout: &Layout, past: &Past, mut writer: Writer) -> Result<Moved> {
        let mut earlier = Vec::new();
        if let Err(error) = self.shards(layout, past, &mut writer, &mut earlier) {
            if self.options.resume && !matches!(error, Error::Interrupted(_)) {
                let _ = writer.finish(|_| Ok(())); // so that what is complete counts as complete
            }
            return Err(error);
        }
        let mut shards = writer.finish(|written| self.report(written))?;
        shards.append(&mut earlier);
        shards.sort_by_key(|record| layout.shards.iter().position(|shard| shard.name == record.name));
        let relative_error = self.errors.iter().map(ErrorSum::relative).collect();
        let found = std::mem::take(&mut self.scan).found().into_iter();
        let not_finite = found.filter_map(|(at, count)| Some((self.source(at).ok()?.name.clone(), count))).collect();
        Ok(Moved { shards, relative_error, bytes_read: self.bytes_read, not_finite, notes: self.notes })
    }

    fn shards(
        &mut self,
        layout: &Layout,
        past: &Past,
        writer: &mut Writer,
        earlier: &mut Vec<ShardRecord>,
    ) -> Result<()> {
        for shard in &layout.shards {
            let marks = past.marks(&shard.name);
            if let Some(record) = self.complete.get(&shard.name) {
                earlier.push(record.clone());
                self.remember(marks);
                self.report(writer.written())?;
            } else {
                self.shard(shard, marks, writer)?;
            }
        }
        Ok(())
    }

    fn shard(&mut self, shard: &OutputShard, marks: &[Mark], writer: &mut Writer) -> Result<()> {
        let mut out = Unfinished::open(self.work, shard, marks)?;
        let known = out.resume(shard, marks, |hashed| self.report(writer.written() + hashed))?;
        if known < marks.len() && !marks.iter().any(|mark| mark.complete) {
            let path = self.work.path().join(&shard.name);
            self.notes.push(format!("{}: lost what was written last; it is written again", path.display()));
        }
        self.remember(marks.get(..known).unwrap_or_default());
        let begun = out.hashed;
        let mut marked = begun;
        self.before += begun;
        self.send(writer, Message::Begin(out.destination()))?;
        if begun == 0 {
            self.write(shard.header.clone(), &mut out, writer)?;
        }
        let steps: Vec<_> = steps(shard, self.checkpoint).into_iter().filter(|step| step.end > begun).collect();
        let mut announced = VecDeque::new();
        let mut next = 0; // to be announced
        for (at, step) in steps.iter().enumerate() {
            self.read_from(step)?;
            next = next.max(at);
            while let Some(step) = steps.get(next)
                && next < at + READ_AHEAD
                && (next == at || self.shard_of(step) == self.reading)
            {
                announced.push_back(self.announce(step)?);
                next += 1;
            }
            self.step(step, shard, &mut out, writer)?;
            announced.pop_front();
            if step.end - marked >= MARK_EVERY {
                let mark = out.mark(std::mem::replace(&mut marked, step.end), std::mem::take(&mut self.learnt), false);
                self.send(writer, Message::Mark(mark))?;
            }
        }
        if shard.ends_source {
            self.done_reading()?;
        }
        let mark = out.mark(marked, std::mem::take(&mut self.learnt), true);
        self.send(writer, Message::Complete(mark))
    }

    fn step(&mut self, step: &Step, of: &OutputShard, out: &mut Unfinished, writer: &mut Writer) -> Result<()> {
        match step.work {
            Work::Copy { shard, offset } => {
                let Some(from) = self.checkpoint.shards().get(shard) else { return Ok(()) };
                self.bytes_read += step.end - step.start;
                while out.hashed < step.end {
                    let mut data = self.buffer(step.end - out.hashed, writer)?;
                    from.read_exact_at(offset + (out.hashed - step.start), &mut data)?;
                    self.scan.look(&of.tensors, out.hashed, &data);
                    self.write(data, out, writer)?;
                }
                Ok(())
            }
            Work::Read { tensor, first_value, dtype } => {
                let source = self.source(tensor)?;
                self.bytes_read += stored(source, (step.end - step.start) as usize / dtype.bytes());
                while out.hashed < step.end {
                    let mut data = self.buffer(step.end - out.hashed, writer)?;
                    let first_value = first_value + (out.hashed - step.start) as usize / dtype.bytes();
                    let overflowed = self.checkpoint.read_as(source, dtype, first_value, &mut data)?;
                    refuse_overflow(&source.name, StoredType::Float(dtype), overflowed)?;
                    self.scan.add(tensor, not_finite(StoredType::Float(dtype), &data));
                    self.write(data, out, writer)?;
                }
                Ok(())
            }
            Work::Merge { tensor, layer, stored } => self.merge(tensor, layer, stored, out, writer),
            Work::Skip => {
                self.before += step.end - step.start;
                out.hash_from_file(step.end, |_| self.report(writer.written()))
            }
        }
    }

    /// Merges the heads of one tensor, in pieces.
    fn merge(
        &mut self,
        tensor: usize,
        layer: LayerTensor,
        stored: StoredType,
        out: &mut Unfinished,
        writer: &mut Writer,
    ) -> Result<()> {
        let source = self.source(tensor)?;
        let config = self.checkpoint.config();
        let rows = self.options.method.rows();
        let Some(merge) = rows.and_then(|rows| KvMerge::of(layer, config, self.plan, rows, &self.options.merge)) else {
            return Ok(()); // the layout has merges only where there is one
        };
        let width = stored.value_bytes().unwrap_or(1); // the layout merges only floats
        let read = |first: usize, out: &mut [f32]| Ok(self.checkpoint.read_finite(source, first, out)?);
        let take = |_: usize, merged: &mut [f32]| {
            for values in merged.chunks_mut(self.piece / width.max(4)) {
                let mut data = self.buffer((values.len() * width) as u64, writer)?;
                refuse_overflow(&source.name, stored, store(values, stored, &mut data))?;
                self.write(data, out, writer)?;
            }
            Ok(())
        };
        let error = merge.run::<Error>(read, take)?;
        self.bytes_read += source.bytes;
        if let Some(sum) = self.errors.get_mut(layer.layer_idx) {
            sum.merge(error);
        }
        let (error, energy) = error.parts();
        let (error_bits, energy_bits) = (error.to_bits(), energy.to_bits());
        self.learnt.merged.push(MergedTensor { layer_idx: layer.layer_idx, error_bits, energy_bits });
        Ok(())
    }

    /// Says that a step's bytes of the source will be read soon.
    fn announce(&self, step: &Step) -> Result<Option<Visit>> {
        let (shard, offset, len) = match step.work {
            Work::Copy { shard, offset } => (shard, offset, step.end - step.start),
            Work::Read { tensor, first_value, dtype } => {
                let source = self.source(tensor)?;
                let count = (step.end - step.start) as usize / dtype.bytes();
                (source.shard, source.offset + stored(source, first_value), stored(source, count))
            }
            Work::Merge { tensor, .. } => {
                let source = self.source(tensor)?;
                (source.shard, source.offset, source.bytes)
            }
            Work::Skip => return Ok(None),
        };
        let Some(shard) = self.checkpoint.shards().get(shard) else { return Ok(None) };
        Ok(Some(Visit::announce(shard.file()?, offset, offset + len)))
    }

    /// The source shard that a step reads.
    fn shard_of(&self, step: &Step) -> Option<usize> {
        match step.work {
            Work::Copy { shard, .. } => Some(shard),
            Work::Read { tensor, .. } | Work::Merge { tensor, .. } => Some(self.source(tensor).ok()?.shard),
            Work::Skip => self.reading,
        }
    }

    /// Gives the source shard back that the steps before were read from, if this one needs another.
    fn read_from(&mut self, step: &Step) -> Result<()> {
        let next = self.shard_of(step);
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

    pub(crate) fn source(&self, at: usize) -> Result<&'a TensorInfo> {
        let none = || Error::Method { method: self.options.method.name.to_owned(), detail: format!("no tensor {at}") };
        self.checkpoint.tensors().get(at).ok_or_else(none)
    }

    /// Hashes the next bytes of a file and has them written.
    fn write(&self, data: Vec<u8>, out: &mut Unfinished, writer: &mut Writer) -> Result<()> {
        let offset = out.hash(&data);
        self.send(writer, Message::Data(data, offset))
    }

    /// A buffer for the next piece, where so many bytes are left.
    fn buffer(&self, left: u64, writer: &mut Writer) -> Result<Vec<u8>> {
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(self.piece);
        writer.buffer(len, |written| self.report(written))
    }

    /// Hands something to the writer, and reports how far that one is.
    fn send(&self, writer: &mut Writer, message: Message) -> Result<()> {
        self.report(writer.written())?;
        writer.send(message)
    }

    /// Reports progress; `written` is what this run has written.
    pub(crate) fn report(&self, written: u64) -> Result<()> {
        Ok(self.progress.advance(PHASE, self.before + written, self.total)?)
    }
}

/// Bytes in which so many values of a tensor are stored.
fn stored(tensor: &TensorInfo, values: usize) -> u64 {
    (u128::from(tensor.bytes) * values as u128 / tensor.len().max(1) as u128) as u64
}

pub(crate) fn refuse_overflow(name: &str, stored: StoredType, count: u64) -> Result<()> {
    let dtype = stored.name().unwrap_or_default();
    if count == 0 { Ok(()) } else { Err(Error::Overflow { name: name.to_owned(), dtype, count }) }
}
