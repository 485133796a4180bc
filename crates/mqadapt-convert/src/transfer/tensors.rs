//! Tensor by tensor, shard by shard in order: long runs of untouched tensors in one go, touched ones in pieces.

use std::borrow::Cow;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use mqadapt_checkpoint::{Checkpoint, StoredType, not_finite, store};
use mqadapt_compress::{ErrorSum, KvMerge};
use mqadapt_core::family::LayerTensor;
use mqadapt_core::{DType, Plan, Progress};

use super::reader::{Reader, stored};
use super::report::Report;
use super::writer::{BUFFERS, Message, Writer};
use crate::folder::directory::Directory;
use crate::layout::steps::{Step, Work, steps};
use crate::layout::{Layout, OutputShard};
use crate::resume::journal::{Learnt, Mark, MergedTensor, Past};
use crate::resume::state::ResumeState;
use crate::resume::unfinished::Unfinished;
use crate::verify::name_of_share;
use crate::{ConvertOptions, Error, Result, ShardRecord};

/// Bytes between two places to continue from.
const MARK_EVERY: u64 = 256 << 20;
/// Steps whose bytes the system is asked to read in advance.
const READ_AHEAD: usize = 4;
/// Most bytes handed over at a time. They stay in the second-level cache between reading and hashing: four times as many
/// take three times as long.
const PIECE: usize = 256 << 10;

/// Moves the bytes of one conversion.
pub(crate) struct Transfer<'a> {
    pub(super) reader: Reader<'a>,
    pub(super) report: Report<'a>,
    pub(super) resumed: ResumeState,
    pub(super) plan: &'a Plan,
    pub(super) options: &'a ConvertOptions,
    pub(super) work: &'a Arc<Directory>,
    /// Bytes handed over at a time.
    pub(super) piece: usize,
    /// Per layer.
    errors: Vec<ErrorSum>,
    /// Since the last mark.
    learnt: Learnt,
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

impl<'a> Transfer<'a> {
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
            reader: Reader::new(checkpoint, options.method.name),
            report: Report::new(progress, total),
            resumed: ResumeState::default(),
            plan,
            options,
            work,
            piece,
            errors: vec![ErrorSum::default(); checkpoint.config().num_hidden_layers],
            learnt: Learnt::default(),
        }
    }

    /// Compares what an earlier run has completed with its checksums.
    pub fn verify(&mut self, layout: &Layout, past: &Past) -> Result<()> {
        let report = &mut self.report;
        self.resumed = ResumeState::verify(self.work, layout, past, |before, hashed| {
            report.before = before;
            report.report(hashed)
        })?;
        self.report.before = self.resumed.bytes(layout);
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
        let mut shards = writer.finish(|written| self.report.report(written))?;
        shards.append(&mut earlier);
        shards.sort_by_key(|record| layout.shards.iter().position(|shard| shard.name == record.name));
        let relative_error = self.errors.iter().map(ErrorSum::relative).collect();
        let found = std::mem::take(&mut self.reader.scan).found().into_iter();
        let checkpoint = self.reader.checkpoint;
        let not_finite = found
            .filter_map(|(at, count)| Some((name_of_share(checkpoint, self.reader.source(at).ok()?), count)))
            .fold(BTreeMap::new(), |mut all, (name, count)| {
                *all.entry(name).or_default() += count;
                all
            });
        Ok(Moved { shards, relative_error, bytes_read: self.reader.bytes_read, not_finite, notes: self.resumed.notes })
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
            if let Some(record) = self.resumed.complete(shard) {
                earlier.push(record.clone());
                self.remember(marks);
                self.report.report(writer.written())?;
            } else {
                self.shard(shard, marks, writer)?;
            }
        }
        Ok(())
    }

    fn shard(&mut self, shard: &OutputShard, marks: &[Mark], writer: &mut Writer) -> Result<()> {
        let mut out = Unfinished::open(self.work, shard, marks)?;
        let known = out.resume(shard, marks, |hashed| self.report.report(writer.written() + hashed))?;
        if known < marks.len() && !marks.iter().any(|mark| mark.complete) {
            let path = self.work.path().join(&shard.name);
            self.resumed.notes.push(format!("{}: lost what was written last; it is written again", path.display()));
        }
        self.remember(marks.get(..known).unwrap_or_default());
        let begun = out.hashed;
        let mut marked = begun;
        self.report.before += begun;
        self.send(writer, Message::Begin(out.destination()))?;
        if begun == 0 {
            self.write(shard.header.clone(), &mut out, writer)?;
        }
        let steps: Vec<_> = steps(shard, self.reader.checkpoint).into_iter().filter(|step| step.end > begun).collect();
        let mut announced = VecDeque::new();
        let mut next = 0; // to be announced
        for (at, step) in steps.iter().enumerate() {
            let sample = self.reader.read_from(step)?;
            self.learnt.samples.extend(sample);
            next = next.max(at);
            while let Some(step) = steps.get(next)
                && next < at + READ_AHEAD
                && (next == at || self.reader.shard_of(step) == self.reader.reading)
            {
                announced.push_back(self.reader.announce(step)?);
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
            let sample = self.reader.done_reading()?;
            self.learnt.samples.extend(sample);
        }
        let mark = out.mark(marked, std::mem::take(&mut self.learnt), true);
        self.send(writer, Message::Complete(mark))
    }

    fn step(&mut self, step: &Step, of: &OutputShard, out: &mut Unfinished, writer: &mut Writer) -> Result<()> {
        match step.work {
            Work::Copy { shard, offset } => {
                let Some(from) = self.reader.checkpoint.shards().get(shard) else { return Ok(()) };
                self.reader.bytes_read += step.end - step.start;
                while out.hashed < step.end {
                    let mut data = self.buffer(step.end - out.hashed, writer)?;
                    from.read_exact_at(offset + (out.hashed - step.start), &mut data)?;
                    self.reader.scan.look(&of.tensors, out.hashed, &data);
                    self.write(data, out, writer)?;
                }
                Ok(())
            }
            Work::Read { tensor, first_value, dtype, as_stored } => {
                let source = self.reader.source(tensor)?;
                let source = if as_stored { Cow::Owned(source.as_stored()) } else { Cow::Borrowed(source) };
                let width = dtype.value_bytes().unwrap_or(1);
                self.reader.bytes_read += stored(&source, (step.end - step.start) as usize / width);
                while out.hashed < step.end {
                    let mut data = self.buffer(step.end - out.hashed, writer)?;
                    let first_value = first_value + (out.hashed - step.start) as usize / width;
                    let checkpoint = self.reader.checkpoint;
                    match dtype.float() {
                        Some(float) => {
                            let overflowed = checkpoint.read_as(&source, float, first_value, &mut data)?;
                            refuse_overflow(&source.name, dtype, overflowed)?;
                        }
                        None => checkpoint.read_stored(&source, first_value, &mut data)?,
                    }
                    self.reader.scan.add(tensor, not_finite(dtype, &data));
                    self.write(data, out, writer)?;
                }
                Ok(())
            }
            Work::Transpose { first, count, first_value, dtype } => {
                let tensors = self.reader.neighbours(first, count)?;
                let float = dtype.float().unwrap_or(DType::F32); // what a GGUF file becomes
                let done = (out.hashed - step.start) as usize;
                let mut values = vec![0; (step.end - out.hashed) as usize];
                let overflowed =
                    self.reader.transposed(tensors, float, first_value + done / float.bytes(), &mut values)?;
                let name = tensors.first().map_or("", |tensor| &tensor.name);
                refuse_overflow(name, dtype, overflowed)?;
                self.reader.scan.add(first, not_finite(dtype, &values));
                self.reader.bytes_read +=
                    tensors.first().map_or(0, |tensor| stored(tensor, values.len() / float.bytes()));
                for piece in values.chunks(self.piece) {
                    let mut data = self.buffer(piece.len() as u64, writer)?;
                    data.copy_from_slice(piece);
                    self.write(data, out, writer)?;
                }
                Ok(())
            }
            Work::Merge { tensor, layer, stored } => self.merge(tensor, layer, stored, out, writer),
            Work::Skip => {
                self.report.before += step.end - step.start;
                out.hash_from_file(step.end, |_| self.report.report(writer.written()))
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
        let source = self.reader.source(tensor)?;
        let config = self.reader.checkpoint.config();
        let rows = self.options.method.rows();
        let Some(merge) = rows.and_then(|rows| KvMerge::of(layer, config, self.plan, rows, &self.options.merge)) else {
            return Ok(()); // the layout has merges only where there is one
        };
        let width = stored.value_bytes().unwrap_or(1); // the layout merges only floats
        let read = |first: usize, out: &mut [f32]| Ok(self.reader.checkpoint.read_finite(source, first, out)?);
        let take = |_: usize, merged: &mut [f32]| {
            for values in merged.chunks_mut(self.piece / width.max(4)) {
                let mut data = self.buffer((values.len() * width) as u64, writer)?;
                refuse_overflow(&source.name, stored, store(values, stored, &mut data))?;
                self.write(data, out, writer)?;
            }
            Ok(())
        };
        let error = merge.run::<Error>(read, take)?;
        self.reader.bytes_read += source.bytes;
        if let Some(sum) = self.errors.get_mut(layer.layer_idx) {
            sum.merge(error);
        }
        let (error, energy) = error.parts();
        let (error_bits, energy_bits) = (error.to_bits(), energy.to_bits());
        self.learnt.merged.push(MergedTensor { layer_idx: layer.layer_idx, error_bits, energy_bits });
        Ok(())
    }

    /// Takes what was learnt before from the journal.
    fn remember(&mut self, marks: &[Mark]) {
        for (number, sample) in marks.iter().flat_map(|mark| &mark.samples) {
            self.reader.checkpoint.remember_sample(*number, sample);
        }
        for merged in marks.iter().flat_map(|mark| &mark.merged) {
            if let Some(sum) = self.errors.get_mut(merged.layer_idx) {
                let parts = (f64::from_bits(merged.error_bits), f64::from_bits(merged.energy_bits));
                sum.merge(ErrorSum::from_parts(parts));
            }
        }
    }

    /// Hashes the next bytes of a file and has them written.
    fn write(&self, data: Vec<u8>, out: &mut Unfinished, writer: &mut Writer) -> Result<()> {
        let offset = out.hash(&data);
        self.send(writer, Message::Data(data, offset))
    }

    /// A buffer for the next piece, given the bytes that are left.
    fn buffer(&self, left: u64, writer: &mut Writer) -> Result<Vec<u8>> {
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(self.piece);
        writer.buffer(len, |written| self.report.report(written))
    }

    /// Hands something to the writer, and reports how far that one is.
    fn send(&self, writer: &mut Writer, message: Message) -> Result<()> {
        self.report.report(writer.written())?;
        writer.send(message)
    }
}

pub(crate) fn refuse_overflow(name: &str, stored: StoredType, count: u64) -> Result<()> {
    let dtype = stored.name().unwrap_or_default();
    if count == 0 { Ok(()) } else { Err(Error::Overflow { name: name.to_owned(), dtype, count }) }
}
