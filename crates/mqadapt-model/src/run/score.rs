//! Log-likelihoods of many (context, continuation) pairs.
//!
//! The requests, sorted by their tokens, are the leaves of a trie in depth-first order. Each of its nodes is computed
//! once, as a piece of a packed pass that reads the K/V of the nodes above it; only the path to the current leaf stays
//! in the cache. So the cache holds one sequence and one pass, however many requests there are, and nothing is padded.
//! Requests that are rotated in different regimes have a trie each.

use mqadapt_core::{Progress, Progressing, RopeRegime};
use mqadapt_kernels::Span;

use crate::backend::{Backend, ScoreTarget, Scored};
use crate::decoder::Stage;
use crate::error::{Error, Result};
use crate::run::session::{Runner, Session};
use crate::workspace::Workspace;

/// The residual streams of a list of requests at the entrance of a layer, as they were computed: pass after pass.
///
/// A sweep over plans keeps them, and the next plan goes on from the first layer in which it differs.
#[derive(Debug, Clone)]
pub struct RequestStates {
    /// Layers that have been run.
    pub(crate) layer_idx: usize,
    /// `[rows, hidden_size]` of each pass.
    pub(crate) passes: Vec<Vec<f32>>,
}

impl RequestStates {
    /// Layers that have been run.
    #[must_use]
    pub fn layer_idx(&self) -> usize {
        self.layer_idx
    }

    /// Bytes that it takes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.passes.iter().map(|pass| pass.len() * size_of::<f32>()).sum()
    }
}

/// The log-likelihood of a continuation, and whether greedy decoding gives it.
pub type Likelihood = (f64, bool);

/// A piece of a sequence is not cut shorter than this to fill up a pass.
const SHORTEST_PIECE: usize = 32;

/// A (context, continuation) pair.
pub(crate) type Request = (Vec<u32>, Vec<u32>);

/// Tokens on the path to the current leaf that were computed together.
struct Node {
    /// Tokens before it in the sequence.
    depth: usize,
    span: Span,
    /// Its first row, while it is part of the pass being put together.
    row: Option<usize>,
}

/// A log-likelihood that the pass being put together will give.
struct Pending {
    row: usize,
    token: u32,
    request: usize,
}

/// The walk through the trie.
struct Walk<'a, B: Backend> {
    runner: &'a Runner<B>,
    session: &'a mut Session<B>,
    path: Vec<Node>,
    /// Slots that are free once the pass has run.
    leaving: Vec<Span>,
    pending: Vec<Pending>,
    /// What the passes start from, if not from embeddings.
    start: Option<&'a RequestStates>,
    /// What is kept of the passes.
    kept: Vec<RequestStates>,
    passes: usize,
    /// Buffers that are refilled for every pass.
    rows: Vec<usize>,
    wanted: Vec<ScoreTarget>,
    scored: Vec<Scored>,
}

impl<B: Backend> Runner<B> {
    /// The log-likelihood of every continuation, and whether greedy decoding gives it.
    pub(crate) fn loglikelihood(&self, requests: &[Request], progress: &dyn Progress) -> Result<Vec<Likelihood>> {
        Ok(self.loglikelihood_from(requests, None, &[], progress)?.0)
    }

    /// The same from residual streams that an earlier call with the same requests kept; keeps those that enter the
    /// layers `keep`.
    pub(crate) fn loglikelihood_from(
        &self,
        requests: &[Request],
        start: Option<&RequestStates>,
        keep: &[usize],
        progress: &dyn Progress,
    ) -> Result<(Vec<Likelihood>, Vec<RequestStates>)> {
        let (first, layers) = (start.map_or(0, |start| start.layer_idx), self.decoder.layers.len());
        if let Some(layer) = keep.iter().find(|layer| !(first..layers).contains(*layer)) {
            let detail = format!("must be layers from {first} to {}; found {layer}", layers - 1);
            return Err(Error::Argument { name: "keep", detail });
        }
        for (index, (context, continuation)) in requests.iter().enumerate() {
            self.check_tokens(context, index)?;
            self.check_tokens(continuation, index)?;
            if context.is_empty() {
                let detail = "is empty; it needs a token at least (lm-eval's prefix token)".to_owned();
                return Err(Error::Argument { name: "context", detail: format!("of request {index} {detail}") });
            }
        }
        let mut results = vec![(0.0, true); requests.len()];
        let tokens = |index: usize| requests[index].0.iter().chain(&requests[index].1);
        // the last token is only predicted, never read
        let read = |(context, continuation): &Request| (context.len() + continuation.len()).saturating_sub(1);
        let regimes: Vec<_> = requests.iter().map(|request| self.decoder.config.rope_regime(read(request))).collect();
        let mut order: Vec<usize> = (0..requests.len()).filter(|&index| !requests[index].1.is_empty()).collect();
        order.sort_by(|&a, &b| regimes[a].cmp(&regimes[b]).then_with(|| tokens(a).cmp(tokens(b))));
        let longest = order.iter().map(|&index| read(&requests[index])).max().unwrap_or(0);
        let mut session = self.session_with(longest + self.max_tokens_in_flight, RopeRegime::default())?;
        let mut walk = Walk {
            runner: self,
            session: &mut session,
            path: Vec::new(),
            leaving: Vec::new(),
            pending: Vec::new(),
            start,
            kept: keep.iter().map(|&layer_idx| RequestStates { layer_idx, passes: Vec::new() }).collect(),
            passes: 0,
            rows: Vec::new(),
            wanted: Vec::new(),
            scored: Vec::new(),
        };
        let mut progressing = Progressing { progress, phase: "requests", done: 0, total: requests.len() as u64 };
        let (mut ids, mut previous): (Vec<u32>, Vec<u32>) = (Vec::new(), Vec::new());
        for (done, &index) in order.iter().enumerate() {
            progressing.done = done as u64;
            if regimes[index] != walk.session.regime() {
                walk.turn_to(regimes[index], &progressing, &mut results)?;
                ids.clear();
            }
            std::mem::swap(&mut ids, &mut previous);
            ids.clear();
            ids.extend(tokens(index));
            walk.visit(index, &ids, &previous, requests[index].0.len() - 1, &progressing, &mut results)?;
        }
        progressing.done = order.len() as u64;
        walk.run(&progressing, &mut results)?;
        progressing.done = progressing.total;
        progressing.tell()?;
        if start.is_some_and(|start| start.passes.len() != walk.passes) {
            return Err(other_requests());
        }
        Ok((results, walk.kept))
    }
}

impl<B: Backend> Walk<'_, B> {
    /// Adds a leaf: `ids`, of which the rows from `first_wanted` on are scored. `previous`: the leaf before.
    fn visit(
        &mut self,
        request: usize,
        ids: &[u32],
        previous: &[u32],
        first_wanted: usize,
        progressing: &Progressing<'_>,
        results: &mut [Likelihood],
    ) -> Result<()> {
        let length = ids.len() - 1; // the last token is only predicted
        let shared = ids.iter().zip(previous).take_while(|(a, b)| a == b).count();
        let shared = shared.min(length).min(self.path.last().map_or(0, |node| node.depth + node.span.len));
        // a row that ran in an earlier pass left its K/V, but nothing to score: from there on it runs again
        let gone = self.path.iter().rfind(|node| node.row.is_none()).map_or(0, |node| node.depth + node.span.len);
        let mut at = if first_wanted < gone.min(shared) { first_wanted } else { shared };
        self.leave(at);
        for node in &self.path {
            let Some(row) = node.row else { continue };
            for position in first_wanted.max(node.depth)..node.depth + node.span.len {
                let row = row + position - node.depth;
                self.pending.push(Pending { row, token: ids[position + 1], request });
            }
        }
        while at < length {
            let (rest, room) = (length - at, self.runner.max_tokens_in_flight - self.session.batch.rows());
            let worth_it = room >= rest.min(SHORTEST_PIECE) || self.session.batch.rows() == 0;
            let taken = if worth_it { self.session.slots.take(rest.min(room)) } else { None };
            let Some(span) = taken else {
                self.run(progressing, results)?;
                continue;
            };
            let piece = at..at + span.len;
            let before = self.path.iter().map(|node| node.span);
            let row = self.session.batch.rows();
            self.session.batch.push(&ids[piece.clone()], before, span.start);
            self.path.push(Node { depth: at, span, row: Some(row) });
            for position in piece.clone().skip(first_wanted.saturating_sub(at)) {
                self.pending.push(Pending { row: row + position - at, token: ids[position + 1], request });
            }
            at = piece.end;
        }
        Ok(())
    }

    /// Cuts the path to its first `length` tokens.
    fn leave(&mut self, length: usize) {
        while let Some(node) = self.path.last_mut().filter(|node| node.depth + node.span.len > length) {
            let kept = length.saturating_sub(node.depth);
            self.leaving.push(Span { start: node.span.start + kept, len: node.span.len - kept });
            node.span.len = kept;
            if kept == 0 {
                self.path.pop();
            }
        }
    }

    /// Ends with the requests of one regime, and goes on with those of another: they share nothing.
    fn turn_to(&mut self, regime: RopeRegime, progressing: &Progressing<'_>, results: &mut [Likelihood]) -> Result<()> {
        self.leave(0);
        self.run(progressing, results)?;
        self.session.turn_to(regime, &self.runner.decoder);
        Ok(())
    }

    /// Runs the pass that has been put together, and adds up what it gives.
    fn run(&mut self, progressing: &Progressing<'_>, results: &mut [Likelihood]) -> Result<()> {
        progressing.tell()?;
        let (decoder, session) = (&self.runner.decoder, &mut *self.session);
        if session.batch.rows() > 0 {
            let first = self.start.map_or(0, |start| start.layer_idx);
            if let Some(start) = self.start {
                let width = decoder.config.hidden_size;
                let values = start.passes.get(self.passes).filter(|pass| pass.len() == session.batch.rows() * width);
                decoder.backend.upload(values.ok_or_else(other_requests)?, width, &mut session.ws.hidden)?;
            }
            let kept = &mut self.kept;
            let observer = &mut |moment: Stage, layer_idx: usize, ws: &Workspace<B>| {
                for states in kept.iter_mut().filter(|kept| moment == Stage::Entering && kept.layer_idx == layer_idx) {
                    states.passes.push(decoder.backend.download(&ws.hidden)?);
                }
                Ok(progressing.tell()?)
            };
            session.observed_pass(decoder, first..decoder.layers.len(), self.start.is_none(), observer)?;
            self.passes += 1;
        }
        if !self.pending.is_empty() {
            self.pending.sort_by_key(|pending| pending.row);
            self.rows.clear();
            self.wanted.clear();
            for pending in &self.pending {
                if self.rows.last() != Some(&pending.row) {
                    self.rows.push(pending.row);
                }
                self.wanted.push(ScoreTarget { row: self.rows.len() - 1, token: pending.token });
            }
            decoder.finish(&self.rows, &mut session.ws)?;
            decoder.backend.score(&session.ws.normed, &decoder.head, &self.wanted, &mut self.scored)?;
            for (pending, scored) in self.pending.drain(..).zip(&self.scored) {
                let (sum, is_greedy) = &mut results[pending.request];
                *sum += scored.logprob;
                *is_greedy &= scored.is_greedy;
            }
        }
        session.batch.clear();
        self.leaving.drain(..).for_each(|span| session.slots.give(span));
        self.path.iter_mut().for_each(|node| node.row = None);
        Ok(())
    }
}

fn other_requests() -> Error {
    Error::Argument { name: "start", detail: "was kept by a call with other requests".to_owned() }
}
