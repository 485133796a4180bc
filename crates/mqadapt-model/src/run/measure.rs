//! How long a pass takes: the question of latency, asked of the model itself without a text.

use std::time::Instant;

use mqadapt_core::{Progress, Progressing};
use mqadapt_kernels::Span;

use crate::backend::{Backend, Linear};
use crate::error::{Error, Result};
use crate::run::session::{Runner, Session};

/// Rows of keys and values that are made up at a time.
const ROWS: usize = 256;

impl<B: Backend> Runner<B> {
    /// Bytes that a decode step reads with `depth` tokens cached: every weight of the layers and of `lm_head` once, and
    /// the cache (sliding windows taken into account).
    pub(crate) fn bytes_per_step(&self, depth: usize) -> u64 {
        let decoder = &self.decoder;
        let linear = |linear: &Linear<B>| decoder.backend.matrix_bytes(&linear.weight);
        let layers = decoder.layers.iter().zip(self.token_bytes()).map(|(block, token)| {
            let (attn, mlp) = (&block.self_attn, &block.mlp);
            let projections = [&attn.q_proj, &attn.k_proj, &attn.v_proj, &attn.o_proj, &mlp.up_proj, &mlp.down_proj];
            let weights = projections.into_iter().chain(&mlp.gate_proj);
            let seen = attn.shape.sliding_window.unwrap_or(depth).min(depth);
            weights.map(linear).sum::<u64>() + token.saturating_mul(seen as u64)
        });
        layers.fold(0, u64::saturating_add) + decoder.backend.matrix_bytes(&decoder.head.lm_head)
    }

    /// Seconds of each of some decode steps, `depth` tokens being cached before the first, for one sequence or several
    /// side by side. The cache is filled with made-up values: time does not depend on them.
    pub(crate) fn measure_decode(
        &self,
        depth: usize,
        steps: usize,
        sequences: usize,
        progress: &dyn Progress,
    ) -> Result<Vec<f64>> {
        if sequences == 0 {
            return Err(Error::Argument { name: "sequences", detail: "must be 1 or more; found 0".to_owned() });
        }
        if steps == 0 {
            return Ok(Vec::new());
        }
        let each = depth.saturating_add(steps);
        let mut session = self.session_with(sequences.saturating_mul(each), self.decoder.config.rope_regime(each))?;
        self.make_up(&mut session, sequences * each)?;
        let (mut times, mut tokens) = (Vec::new(), vec![0; sequences]);
        let rows: Vec<usize> = (0..sequences).collect();
        for step in 0..steps {
            let progressing = Progressing { progress, phase: "steps", done: step as u64, total: steps as u64 };
            let started = Instant::now();
            session.batch.clear();
            for (sequence, token) in tokens.iter().enumerate() {
                let before = Span { start: sequence * each, len: depth + step };
                session.batch.push(&[*token], [before], sequence * each + depth + step);
            }
            session.pass(&self.decoder, 0..self.decoder.layers.len(), true, &progressing)?;
            self.decoder.finish(&rows, &mut session.ws)?;
            self.decoder.backend.argmax(&session.ws.normed, &self.decoder.head, &mut tokens)?;
            times.push(started.elapsed().as_secs_f64());
        }
        Ok(times)
    }

    /// Seconds of each of some passes over a prompt of this many tokens, with the next token's logits.
    pub(crate) fn measure_prefill(&self, tokens: usize, passes: usize, progress: &dyn Progress) -> Result<Vec<f64>> {
        if tokens == 0 {
            return Err(Error::Argument { name: "tokens", detail: "must be 1 or more; found 0".to_owned() });
        }
        let vocab_size = self.decoder.config.vocab_size;
        // which says whether there is memory for so many
        let mut session = self.session_with(tokens, self.decoder.config.rope_regime(tokens))?;
        let ids: Vec<u32> = (0..tokens).map(|token| (token * 7919 % vocab_size) as u32).collect();
        let (mut times, mut next) = (Vec::new(), Vec::new());
        for pass in 0..passes {
            let progressing = Progressing { progress, phase: "passes", done: pass as u64, total: passes as u64 };
            let started = Instant::now();
            for (nth, piece) in ids.chunks(self.max_tokens_in_flight).enumerate() {
                let at = nth * self.max_tokens_in_flight;
                session.batch.clear();
                session.batch.push(piece, [Span { start: 0, len: at }], at);
                session.pass(&self.decoder, 0..self.decoder.layers.len(), true, &progressing)?;
            }
            let last = session.batch.rows() - 1;
            self.decoder.finish(&[last], &mut session.ws)?;
            self.decoder.backend.argmax(&session.ws.normed, &self.decoder.head, &mut next)?;
            times.push(started.elapsed().as_secs_f64());
        }
        Ok(times)
    }

    /// Writes keys and values to the first slots of every layer: memory that was never written is not read from memory.
    fn make_up(&self, session: &mut Session<B>, slots: usize) -> Result<()> {
        let Session { caches, batch, ws, .. } = session;
        let backend = &self.decoder.backend;
        for (block, cache) in self.decoder.layers.iter().zip(caches) {
            let shape = &block.self_attn.shape;
            let width = shape.num_key_value_heads * shape.head_dim;
            let values: Vec<f32> = (0..ROWS * width).map(|i| (i % 61) as f32 / 30.0 - 1.0).collect();
            for first in (0..slots).step_by(ROWS) {
                let rows = ROWS.min(slots - first);
                batch.clear();
                batch.push_rows(rows, [], first);
                backend.upload(&values[..rows * width], width, &mut ws.k)?;
                backend.upload(&values[..rows * width], width, &mut ws.v)?;
                backend.store(&ws.k, &ws.v, shape, batch, cache)?;
            }
        }
        Ok(())
    }
}
