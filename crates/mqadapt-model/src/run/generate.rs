//! Continuing many prompts at once (continuous batching): every pass takes one row of each sequence that is being
//! continued, and fills up with prompts that wait. Prompts share the K/V of what they have in common. Sequences that are
//! continued at the same time are rotated in the same regime, that of the longest text which they may become.

use mqadapt_core::{Progress, Progressing, RopeRegime};
use mqadapt_kernels::Span;

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::options::GenerateOptions;
use crate::run::sample::Sampler;
use crate::run::session::{Runner, Session};

/// Sequences that are continued at the same time, at most.
const MOST_SEQUENCES: usize = 64;
/// Slots that a sequence takes at a time for its new tokens.
const SLOTS_AT_A_TIME: usize = 64;

/// Told every new token with its sequence's index; `false` ends the sequence.
pub(crate) type OnToken<'a> = dyn FnMut(usize, u32) -> bool + 'a;

/// A run of slots that several sequences may read.
struct Node {
    span: Span,
    users: usize,
}

/// Runs of slots, counted.
#[derive(Default)]
struct Nodes {
    nodes: Vec<Node>,
    unused: Vec<usize>,
}

/// The first `len` slots of a node.
#[derive(Clone, Copy)]
struct Part {
    node: usize,
    len: usize,
}

/// A prompt that is being read or continued.
struct Sequence {
    /// Index of its prompt.
    index: usize,
    /// The prompt, then what was added.
    ids: Vec<u32>,
    /// Where its first `cached` tokens are.
    parts: Vec<Part>,
    cached: usize,
    /// Slots it may come to take.
    reserved: usize,
    ended: bool,
}

/// The prompt admitted last and what of it is cached, kept until the next: sorted, a prompt shares most with its neighbour.
#[derive(Default)]
struct Latest {
    prompt: Vec<u32>,
    /// Index of the prompt.
    index: usize,
    parts: Vec<Part>,
}

/// All that runs.
struct Schedule<'a, B: Backend> {
    runner: &'a Runner<B>,
    session: &'a mut Session<B>,
    options: &'a GenerateOptions,
    /// The regime of each prompt with all of its new tokens.
    regimes: &'a [RopeRegime],
    nodes: Nodes,
    active: Vec<Sequence>,
    latest: Latest,
    /// Slots not reserved.
    unreserved: usize,
    /// Rows of the pass whose next token is wanted, and their sequences.
    rows: Vec<usize>,
    owners: Vec<usize>,
    tokens: Vec<u32>,
    logits: Vec<f32>,
    sampler: Sampler,
}

impl Nodes {
    fn add(&mut self, span: Span) -> usize {
        let node = Node { span, users: 1 };
        if let Some(index) = self.unused.pop() {
            self.nodes[index] = node;
            return index;
        }
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn span(&self, part: Part) -> Span {
        Span { start: self.nodes[part.node].span.start, len: part.len }
    }

    /// A path, shared.
    fn share(&mut self, path: &[Part]) -> Vec<Part> {
        for part in path {
            self.nodes[part.node].users += 1;
        }
        path.to_vec()
    }

    fn release<B: Backend>(&mut self, parts: &[Part], session: &mut Session<B>) {
        for part in parts {
            let node = &mut self.nodes[part.node];
            node.users -= 1;
            if node.users == 0 {
                session.slots.give(node.span);
                self.unused.push(part.node);
            }
        }
    }
}

fn check(prompts: &[Vec<u32>], options: &GenerateOptions) -> Result<()> {
    let wrong = |name, detail: String| Err(Error::Argument { name, detail });
    if let Some(index) = prompts.iter().position(Vec::is_empty) {
        return wrong("prompt", format!("{index} is empty; it needs a token at least"));
    }
    if !options.temperature.is_finite() || options.temperature < 0.0 {
        return wrong("temperature", format!("must be 0 or a positive number; found {}", options.temperature));
    }
    if options.top_k == Some(0) {
        return wrong("top_k", "must be 1 or more; found 0".to_owned());
    }
    if let Some(top_p) = options.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
        return wrong("top_p", format!("must be above 0 and at most 1; found {top_p}"));
    }
    Ok(())
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl<B: Backend> Runner<B> {
    /// Continues every prompt; the new tokens only.
    pub(crate) fn generate(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        on_token: &mut OnToken<'_>,
        progress: &dyn Progress,
    ) -> Result<Vec<Vec<u32>>> {
        check(prompts, options)?;
        for (index, prompt) in prompts.iter().enumerate() {
            self.check_tokens(prompt, index)?;
        }
        let mut results = vec![Vec::new(); prompts.len()];
        if options.max_new_tokens == 0 {
            return Ok(results);
        }
        let new = options.max_new_tokens;
        // the last new token is never read
        let read = |prompt: &Vec<u32>| prompt.len().saturating_add(new - 1);
        let regimes: Vec<_> = prompts.iter().map(|prompt| self.decoder.config.rope_regime(read(prompt))).collect();
        let mut order: Vec<usize> = (0..prompts.len()).collect();
        // the next is taken from the end
        order.sort_by(|&a, &b| (regimes[b], &prompts[b]).cmp(&(regimes[a], &prompts[a])));
        let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
        let each = prompts.iter().fold(0, |sum: usize, prompt| sum.saturating_add(prompt.len().saturating_add(new)));
        // room for one sequence and the latest prompt always, for several in proportion to what may be in flight
        let capacity = longest.saturating_add(new).max(each.min(4 * self.max_tokens_in_flight));
        let mut session = self.session_with(capacity.saturating_add(longest), RopeRegime::default())?;
        let mut schedule = Schedule {
            runner: self,
            session: &mut session,
            options,
            regimes: &regimes,
            nodes: Nodes::default(),
            active: Vec::new(),
            latest: Latest::default(),
            unreserved: capacity,
            rows: Vec::new(),
            owners: Vec::new(),
            tokens: Vec::new(),
            logits: Vec::new(),
            sampler: Sampler::default(),
        };
        let total = prompts.len() as u64;
        let mut progressing = Progressing { progress, phase: "sequences", done: 0, total };
        loop {
            schedule.fill(&mut order, prompts);
            if schedule.active.is_empty() {
                break;
            }
            schedule.step(&progressing, on_token)?;
            progressing.done += schedule.collect(&mut results, prompts);
        }
        progressing.tell()?;
        Ok(results)
    }
}

impl<B: Backend> Schedule<'_, B> {
    /// Puts the next pass together.
    fn fill(&mut self, waiting: &mut Vec<usize>, prompts: &[Vec<u32>]) {
        self.session.batch.clear();
        self.rows.clear();
        self.owners.clear();
        for owner in 0..self.active.len() {
            self.push(owner);
        }
        while let Some(&index) = waiting.last() {
            let prompt = &prompts[index];
            let reserved = prompt.len() + self.options.max_new_tokens;
            let full = self.session.batch.rows() >= self.runner.max_tokens_in_flight;
            if full || reserved > self.unreserved || self.active.len() >= MOST_SEQUENCES || !self.turn_to(index) {
                break;
            }
            waiting.pop();
            self.unreserved -= reserved;
            self.admit(index, prompt, reserved);
        }
    }

    /// Whether a prompt can be read now: in the regime of those that are continued, or where there are none, in its own.
    fn turn_to(&mut self, index: usize) -> bool {
        let regime = self.regimes[index];
        if regime == self.session.regime() {
            return true;
        }
        if !self.active.is_empty() {
            return false;
        }
        self.nodes.release(&self.latest.parts, self.session);
        self.latest = Latest::default();
        self.session.turn_to(regime, &self.runner.decoder);
        true
    }

    /// Takes a prompt in, with what it shares with the prompt before it.
    fn admit(&mut self, index: usize, prompt: &[u32], reserved: usize) {
        // the last token is always read: its row gives the first new token
        let shared = common(prompt, &self.latest.prompt).min(prompt.len() - 1);
        let (whole, shared) = self.cut(shared);
        let mut parts = self.nodes.share(&self.latest.parts[..whole]);
        // room for all that its new tokens will take, so that they allocate nothing
        let pieces = self.options.max_new_tokens / SLOTS_AT_A_TIME + 8;
        parts.reserve(pieces);
        self.nodes.nodes.reserve(pieces);
        self.session.batch.spans.reserve(pieces);
        let mut ids = Vec::with_capacity(reserved);
        ids.extend_from_slice(prompt);
        self.active.push(Sequence { index, ids, parts, cached: shared, reserved, ended: false });
        self.nodes.release(&self.latest.parts, self.session);
        self.latest = Latest { prompt: prompt.to_vec(), index, parts: Vec::new() };
        self.push(self.active.len() - 1);
    }

    /// Cuts the latest path at `length` tokens, splitting a node that reaches across: whoever shares a node shares all
    /// of it, so no slot is kept for tokens that nobody has. Returns the parts up to there, and their tokens.
    fn cut(&mut self, length: usize) -> (usize, usize) {
        let mut before = 0;
        for at in 0..self.latest.parts.len() {
            let Part { node, len } = self.latest.parts[at];
            if before + len > length {
                let kept = length - before;
                if kept == 0 {
                    return (at, before);
                }
                self.split(node, kept);
                return (at + 1, length);
            }
            before += len;
        }
        (self.latest.parts.len(), before)
    }

    /// Makes two nodes of one.
    fn split(&mut self, node: usize, kept: usize) {
        let Span { start, len } = self.nodes.nodes[node].span;
        self.nodes.nodes[node].span.len = kept;
        let tail = self.nodes.add(Span { start: start + kept, len: len - kept });
        self.nodes.nodes[tail].users = 0;
        let paths = self.active.iter_mut().map(|sequence| &mut sequence.parts).chain([&mut self.latest.parts]);
        for parts in paths {
            let Some(at) = parts.iter().position(|part| part.node == node) else { continue };
            let rest = parts[at].len - kept;
            parts[at].len = kept;
            parts.insert(at + 1, Part { node: tail, len: rest });
            self.nodes.nodes[tail].users += 1;
        }
    }

    /// Adds rows of a sequence to the pass: what it has not read, as far as there is room.
    fn push(&mut self, owner: usize) {
        let Self { session, nodes, active, latest, .. } = self;
        let sequence = &mut active[owner];
        let prompt = sequence.reserved - self.options.max_new_tokens;
        let reading = sequence.cached < prompt;
        while sequence.cached < sequence.ids.len() {
            let rest = sequence.ids.len() - sequence.cached;
            let room = self.runner.max_tokens_in_flight.saturating_sub(session.batch.rows());
            if room == 0 {
                break;
            }
            let last = sequence.parts.last().map_or((0, 0), |part| (part.node, part.len));
            let left = nodes.nodes.get(last.0).map_or(0, |node| node.span.len.saturating_sub(last.1));
            if sequence.parts.is_empty() || left == 0 {
                // a prompt takes what it reads now; new tokens come one by one and take slots ahead
                let ahead = SLOTS_AT_A_TIME.min(sequence.reserved - sequence.cached);
                let want = if sequence.cached < prompt { rest.min(room) } else { ahead };
                let Some(span) = session.slots.take(want) else { break };
                sequence.parts.push(Part { node: nodes.add(span), len: 0 });
                continue;
            }
            let count = rest.min(room).min(left);
            let slot = nodes.nodes[last.0].span.start + last.1;
            let (row, first) = (session.batch.rows(), sequence.cached);
            session.batch.push(
                &sequence.ids[first..first + count],
                sequence.parts.iter().map(|part| nodes.span(*part)),
                slot,
            );
            if let Some(part) = sequence.parts.last_mut() {
                part.len += count;
            }
            sequence.cached += count;
            if sequence.cached == sequence.ids.len() {
                self.rows.push(row + count - 1);
                self.owners.push(owner);
            }
        }
        if reading && latest.index == sequence.index && !latest.prompt.is_empty() {
            nodes.release(&latest.parts, session);
            latest.parts = nodes.share(&sequence.parts);
        }
    }

    /// Runs the pass, and gives every sequence that has read all of its tokens a new one.
    fn step(&mut self, progressing: &Progressing<'_>, on_token: &mut OnToken<'_>) -> Result<()> {
        let (decoder, session) = (&self.runner.decoder, &mut *self.session);
        session.pass(decoder, 0..decoder.layers.len(), true, progressing)?;
        if self.rows.is_empty() {
            return Ok(()); // a long prompt, not read to its end yet
        }
        decoder.finish(&self.rows, &mut session.ws)?;
        let greedy = self.options.temperature == 0.0;
        if greedy {
            decoder.backend.argmax(&session.ws.normed, &decoder.head, &mut self.tokens)?;
        } else {
            decoder.backend.logits(&session.ws.normed, &decoder.head, &mut self.logits)?;
        }
        for (nth, &owner) in self.owners.iter().enumerate() {
            let sequence = &mut self.active[owner];
            let token = if greedy {
                self.tokens[nth]
            } else {
                let vocab_size = decoder.config.vocab_size;
                let logits = &self.logits[nth * vocab_size..(nth + 1) * vocab_size];
                self.sampler.draw(logits, self.options, sequence.index, sequence.ids.len())
            };
            if self.options.stop_tokens.contains(&token) {
                sequence.ended = true;
                continue;
            }
            sequence.ids.push(token);
            let all = sequence.ids.len() == sequence.reserved;
            sequence.ended = !on_token(sequence.index, token) || all;
        }
        Ok(())
    }

    /// Takes out the sequences that have ended; how many.
    fn collect(&mut self, results: &mut [Vec<u32>], prompts: &[Vec<u32>]) -> u64 {
        let mut ended = 0;
        let mut at = 0;
        while at < self.active.len() {
            if !self.active[at].ended {
                at += 1;
                continue;
            }
            // the order of those that stay does not change: results do not depend on who ends when
            let sequence = self.active.remove(at);
            self.nodes.release(&sequence.parts, self.session);
            self.unreserved += sequence.reserved;
            results[sequence.index] = sequence.ids[prompts[sequence.index].len()..].to_vec();
            ended += 1;
        }
        ended
    }
}
