//! Looking inside: logits of every position, residual streams between layers, divergences; in [`layers`] what each layer saw.

mod layers;

use std::ops::Range;

use mqadapt_core::{Progress, Progressing, RopeRegime};
use mqadapt_kernels::Span;

use crate::allocator;
use crate::backend::{Backend, ScoreTarget};
use crate::decoder::Stage;
use crate::error::{Error, Result};
use crate::run::hidden_states::HiddenStates;
use crate::run::session::{Runner, Session};
use crate::workspace::Workspace;

pub use layers::Visitor;

/// Rows whose logits are held at a time.
const LOGIT_ROWS: usize = 32;

/// What a run of layers starts from.
enum Input<'a> {
    Tokens(&'a [Vec<u32>]),
    Hidden(&'a HiddenStates),
}

impl Input<'_> {
    fn lengths(&self) -> Vec<usize> {
        match self {
            Self::Tokens(sequences) => sequences.iter().map(Vec::len).collect(),
            Self::Hidden(hidden) => hidden.lengths.clone(),
        }
    }
}

fn wrong(name: &'static str, detail: String) -> Error {
    Error::Argument { name, detail }
}

/// Room for `[rows, width]` values in main memory.
fn room(what: &'static str, rows: usize, width: usize) -> Result<Vec<f32>> {
    let values = rows.saturating_mul(width);
    let bytes = values.saturating_mul(size_of::<f32>()) as u64;
    let mut out = Vec::new();
    if allocator::may_take(bytes) && out.try_reserve_exact(values).is_ok() {
        return Ok(out);
    }
    Err(Error::Results { what, bytes })
}

impl<B: Backend> Runner<B> {
    /// Logits of every position; the sequence goes through the cache in pieces of the lengths in `steps`.
    pub(crate) fn logits(&self, ids: &[u32], steps: &[usize], progress: &dyn Progress) -> Result<Vec<f32>> {
        self.check_tokens(ids, 0)?;
        let total = ids.len() as u64;
        let mut session = self.session_with(ids.len(), self.decoder.config.rope_regime(ids.len()))?;
        let mut out = room("logits", ids.len(), self.decoder.config.vocab_size)?;
        let mut tile = Vec::new();
        let mut steps = steps.iter().copied().filter(|&step| step > 0);
        let mut at = 0;
        while at < ids.len() {
            let step = steps.next().unwrap_or(self.max_tokens_in_flight).min(ids.len() - at);
            let progressing = Progressing { progress, phase: "tokens", done: at as u64, total };
            session.one_piece(&ids[at..at + step], at);
            session.pass(&self.decoder, 0..self.decoder.layers.len(), true, &progressing)?;
            for first in (0..step).step_by(LOGIT_ROWS) {
                progressing.tell()?;
                let rows: Vec<usize> = (first..step.min(first + LOGIT_ROWS)).collect();
                self.decoder.finish(&rows, &mut session.ws)?;
                self.decoder.backend.logits(&session.ws.normed, &self.decoder.head, &mut tile)?;
                out.extend_from_slice(&tile);
            }
            at += step;
        }
        Ok(out)
    }

    /// The residual stream entering every layer, and what the final norm gives.
    pub(crate) fn hidden_states(&self, ids: &[u32], progress: &dyn Progress) -> Result<Vec<Vec<f32>>> {
        self.check_tokens(ids, 0)?;
        let layers = self.decoder.layers.len();
        let mut session = self.session_with(ids.len(), self.decoder.config.rope_regime(ids.len()))?;
        drop(room("hidden states", ids.len(), (layers + 1) * self.decoder.config.hidden_size)?);
        let mut out = vec![Vec::new(); layers + 1];
        if ids.is_empty() {
            return Ok(out);
        }
        let progressing = Progressing { progress, phase: "tokens", done: 0, total: ids.len() as u64 };
        session.one_piece(ids, 0);
        let backend = &self.decoder.backend;
        session.observed_pass(&self.decoder, 0..layers, true, &mut |moment, layer: usize, ws: &Workspace<B>| {
            if moment == Stage::Entering {
                out[layer] = backend.download(&ws.hidden)?;
            }
            Ok(progressing.tell()?)
        })?;
        let rows: Vec<usize> = (0..ids.len()).collect();
        self.decoder.finish(&rows, &mut session.ws)?;
        out[layers] = backend.download(&session.ws.normed)?;
        // the final norm of a decoder has the divisor of the logits in it
        let scaling = self.decoder.config.logits_scaling as f32;
        if scaling != 1.0 {
            for value in &mut out[layers] {
                *value *= scaling;
            }
        }
        Ok(out)
    }

    /// The residual stream of some sequences at the entrance of a layer.
    pub(crate) fn hidden_before(
        &self,
        layer_idx: usize,
        sequences: &[Vec<u32>],
        progress: &dyn Progress,
    ) -> Result<HiddenStates> {
        for (index, sequence) in sequences.iter().enumerate() {
            self.check_tokens(sequence, index)?;
        }
        self.check_layer(layer_idx)?;
        self.advance(&Input::Tokens(sequences), 0..layer_idx, progress)
    }

    /// The residual stream further up.
    pub(crate) fn forward_from(
        &self,
        hidden: &HiddenStates,
        layer_idx: usize,
        progress: &dyn Progress,
    ) -> Result<HiddenStates> {
        self.check_hidden("hidden", hidden)?;
        self.check_layer(layer_idx)?;
        if hidden.layer_idx > layer_idx {
            let detail = format!("is at layer {}, behind layer {layer_idx}", hidden.layer_idx);
            return Err(wrong("hidden", detail));
        }
        self.advance(&Input::Hidden(hidden), hidden.layer_idx..layer_idx, progress)
    }

    fn check_layer(&self, layer_idx: usize) -> Result<()> {
        let layers = self.decoder.layers.len();
        if layer_idx <= layers {
            return Ok(());
        }
        Err(wrong("layer_idx", format!("must be at most {layers}, behind the last layer; found {layer_idx}")))
    }

    fn check_hidden(&self, name: &'static str, hidden: &HiddenStates) -> Result<()> {
        let expected = hidden.lengths.iter().sum::<usize>() * self.decoder.config.hidden_size;
        if hidden.values.len() == expected {
            return Ok(());
        }
        Err(wrong(name, format!("must have {expected} values for its lengths; found {}", hidden.values.len())))
    }

    /// Runs some layers on packed sequences, as many rows at a time as may be in flight.
    fn advance(&self, input: &Input<'_>, layers: Range<usize>, progress: &dyn Progress) -> Result<HiddenStates> {
        let (lengths, width) = (input.lengths(), self.decoder.config.hidden_size);
        let rows: usize = lengths.iter().sum();
        let passes = passes(&lengths, self.max_tokens_in_flight);
        let regimes: Vec<_> = lengths.iter().map(|&tokens| self.decoder.config.rope_regime(tokens)).collect();
        let regime = |piece: &Piece| regimes[piece.sequence];
        let mut out = HiddenStates { layer_idx: layers.end, lengths, values: room("hidden states", rows, width)? };
        let longest = out.lengths.iter().copied().max().unwrap_or(0);
        let slots = longest.max(self.max_tokens_in_flight.min(rows));
        let mut session = self.session_with(slots, RopeRegime::default())?;
        let mut first = 0; // row of the pass's first token
        for pass in passes.iter().flat_map(|pass| pass.chunk_by(|a, b| regime(a) == regime(b))) {
            session.batch.clear();
            for piece in pass {
                session.turn_to(regime(piece), &self.decoder);
                let before = [Span { start: piece.base, len: piece.tokens.start }];
                let slot = piece.base + piece.tokens.start;
                match input {
                    Input::Tokens(all) => session.batch.push(&all[piece.sequence][piece.tokens.clone()], before, slot),
                    Input::Hidden(_) => session.batch.push_rows(piece.tokens.len(), before, slot),
                }
            }
            let count = session.batch.rows();
            let progressing = Progressing { progress, phase: "tokens", done: first as u64, total: rows as u64 };
            if let Input::Hidden(hidden) = input {
                let values = &hidden.values[first * width..(first + count) * width];
                self.decoder.backend.upload(values, width, &mut session.ws.hidden)?;
            }
            session.pass(&self.decoder, layers.clone(), matches!(input, Input::Tokens(_)), &progressing)?;
            out.values.extend(self.decoder.backend.download(&session.ws.hidden)?);
            first += count;
        }
        Ok(out)
    }

    /// Rows behind the last layer, `[rows, hidden_size]`, through the final norm.
    fn finish_rows(&self, values: &[f32], session: &mut Session<B>) -> Result<()> {
        let width = self.decoder.config.hidden_size;
        self.decoder.backend.upload(values, width, &mut session.ws.hidden)?;
        self.decoder.finish(&(0..values.len() / width).collect::<Vec<_>>(), &mut session.ws)
    }

    fn check_finished(&self, name: &'static str, hidden: &HiddenStates) -> Result<()> {
        self.check_hidden(name, hidden)?;
        let layers = self.decoder.layers.len();
        if hidden.layer_idx == layers {
            return Ok(());
        }
        Err(wrong(name, format!("must be behind the last layer, {layers}; found layer {}", hidden.layer_idx)))
    }

    /// Negative log-likelihood of every token but the first of each sequence.
    pub(crate) fn nll(
        &self,
        hidden: &HiddenStates,
        sequences: &[Vec<u32>],
        progress: &dyn Progress,
    ) -> Result<Vec<f64>> {
        self.check_finished("hidden", hidden)?;
        if !sequences.iter().map(Vec::len).eq(hidden.lengths.iter().copied()) {
            return Err(wrong("sequences", "must have the lengths of the hidden states".to_owned()));
        }
        let mut wanted = Vec::new(); // over all rows
        let mut first = 0;
        for (index, sequence) in sequences.iter().enumerate() {
            self.check_tokens(sequence, index)?;
            wanted.extend(sequence.iter().skip(1).enumerate().map(|(i, &token)| ScoreTarget { row: first + i, token }));
            first += sequence.len();
        }
        let (width, mut session) = (self.decoder.config.hidden_size, self.session());
        let (mut out, mut scored) = (Vec::with_capacity(wanted.len()), Vec::new());
        for start in (0..first).step_by(self.max_tokens_in_flight) {
            Progressing { progress, phase: "tokens", done: start as u64, total: first as u64 }.tell()?;
            let end = first.min(start + self.max_tokens_in_flight);
            self.finish_rows(&hidden.values[start * width..end * width], &mut session)?;
            let mine = wanted.partition_point(|w| w.row < start)..wanted.partition_point(|w| w.row < end);
            let mine: Vec<_> = wanted[mine].iter().map(|w| ScoreTarget { row: w.row - start, ..*w }).collect();
            self.decoder.backend.score(&session.ws.normed, &self.decoder.head, &mine, &mut scored)?;
            out.extend(scored.iter().map(|scored| -scored.logprob));
        }
        Ok(out)
    }

    /// Divergences of the next-token distributions of each of `hidden` from those of `reference`, row by row.
    pub(crate) fn kl_divergences(
        &self,
        reference: &HiddenStates,
        hidden: &[&HiddenStates],
        progress: &dyn Progress,
    ) -> Result<Vec<Vec<f64>>> {
        self.check_finished("reference", reference)?;
        for states in hidden {
            self.check_finished("hidden", states)?;
            if reference.lengths != states.lengths {
                return Err(wrong("hidden", "must have the lengths of the reference".to_owned()));
            }
        }
        let (total, width) = (reference.lengths.iter().sum::<usize>(), self.decoder.config.hidden_size);
        let mut session = self.session();
        let (mut out, mut values, mut found) = (vec![vec![0.0; total]; hidden.len()], Vec::new(), Vec::new());
        for first in (0..total).step_by(B::DIVERGENCE_ROWS) {
            Progressing { progress, phase: "tokens", done: first as u64, total: total as u64 }.tell()?;
            let rows = first..total.min(first + B::DIVERGENCE_ROWS);
            values.clear();
            for states in std::iter::once(&reference).chain(hidden) {
                values.extend_from_slice(&states.values[rows.start * width..rows.end * width]);
            }
            self.finish_rows(&values, &mut session)?;
            self.decoder.backend.divergences(&session.ws.normed, &self.decoder.head, rows.len(), &mut found)?;
            for (out, found) in out.iter_mut().zip(found.chunks_exact(rows.len())) {
                out[rows.clone()].copy_from_slice(found);
            }
        }
        Ok(out)
    }
}

impl<B: Backend> Session<B> {
    /// The batch becomes one piece of one sequence, whose earlier tokens are in the slots before.
    fn one_piece(&mut self, ids: &[u32], at: usize) {
        self.batch.clear();
        self.batch.push(ids, [Span { start: 0, len: at }], at);
    }
}

/// A piece of a sequence in a pass.
#[derive(Debug, PartialEq)]
struct Piece {
    sequence: usize,
    /// Slot of the sequence's first token.
    base: usize,
    tokens: Range<usize>,
}

/// Packs sequences into passes of at most `most` rows, in order: whole sequences together, longer ones cut and alone.
fn passes(lengths: &[usize], most: usize) -> Vec<Vec<Piece>> {
    let mut passes: Vec<Vec<Piece>> = Vec::new();
    let mut room = 0;
    for (sequence, &length) in lengths.iter().enumerate().filter(|(_, length)| **length > 0) {
        if length > most {
            let starts = (0..length).step_by(most);
            passes.extend(starts.map(|at| vec![Piece { sequence, base: 0, tokens: at..length.min(at + most) }]));
            room = 0;
            continue;
        }
        if room < length {
            passes.push(Vec::new());
            room = most;
        }
        if let Some(pass) = passes.last_mut() {
            pass.push(Piece { sequence, base: most - room, tokens: 0..length });
        }
        room -= length;
    }
    passes
}

#[cfg(test)]
mod tests;
