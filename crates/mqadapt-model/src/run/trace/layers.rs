//! What each layer saw of some sequences, and the residual stream behind it: layer by layer, a piece of a sequence at a time.

use mqadapt_core::{Progress, Progressing};
use mqadapt_kernels::Span;

use crate::backend::Backend;
use crate::decoder::Stage;
use crate::error::{Error, Result};
use crate::run::hidden_states::{HiddenStates, LayerTrace};
use crate::run::session::Runner;
use crate::workspace::Workspace;

/// Most rows of a pass that is traced: its activations are small beside what is kept of a sequence.
const TRACED_ROWS: usize = 512;

/// Is shown what a layer saw of each sequence.
pub type Visitor<'a, E> = dyn FnMut(&LayerTrace<'_>) -> std::result::Result<(), E> + 'a;

/// What a layer saw of one sequence, piece after piece, in the order of [`LayerTrace`].
#[derive(Default)]
struct Seen([Vec<f32>; 5]);

impl Seen {
    /// `pieces` of these rows are to come, this one included.
    fn keep<B: Backend>(&mut self, moment: Stage, ws: &Workspace<B>, backend: &B, pieces: usize) -> Result<()> {
        let keep = |seen: &mut Vec<f32>, buffer: &B::Buffer| -> Result<()> {
            let values = backend.download(buffer)?;
            seen.reserve_exact(pieces * values.len());
            seen.extend(values);
            Ok(())
        };
        let [projected @ .., attention] = &mut self.0;
        match moment {
            Stage::Entering => {}
            Stage::Projected => {
                for (seen, buffer) in projected.iter_mut().zip([&ws.normed, &ws.q, &ws.k, &ws.v]) {
                    keep(seen, buffer)?;
                }
            }
            Stage::Attended => keep(attention, &ws.attention)?,
        }
        Ok(())
    }
}

impl<B: Backend> Runner<B> {
    /// Layer by layer, every sequence through it.
    pub(crate) fn trace_layers<E: From<Error>>(
        &self,
        sequences: &[Vec<u32>],
        visitor: &mut Visitor<'_, E>,
        progress: &dyn Progress,
    ) -> std::result::Result<HiddenStates, E> {
        let layers = self.decoder.layers.len();
        let mut hidden = self.hidden_before(0, sequences, progress)?;
        for layer_idx in 0..layers {
            let progressing = Progressing { progress, phase: "layers", done: layer_idx as u64, total: layers as u64 };
            self.trace_layer(layer_idx, layer_idx, &mut hidden, true, Some(&mut *visitor), &progressing)?;
        }
        hidden.layer_idx = layers;
        Ok(hidden)
    }

    /// Every sequence through layer `at` of this decoder, which the visitor knows as `layer_idx`; without one, nothing is
    /// kept of what it saw. Where `behind` says so, the rows become those behind the layer.
    pub(crate) fn trace_layer<E: From<Error>>(
        &self,
        at: usize,
        layer_idx: usize,
        hidden: &mut HiddenStates,
        behind: bool,
        mut visitor: Option<&mut Visitor<'_, E>>,
        progressing: &Progressing<'_>,
    ) -> std::result::Result<(), E> {
        let width = self.decoder.config.hidden_size;
        let longest = hidden.lengths.iter().copied().max().unwrap_or(0);
        let mut rest = hidden.values.as_mut_slice();
        for (sequence, &length) in hidden.lengths.iter().enumerate() {
            let (stream, others) = std::mem::take(&mut rest).split_at_mut(length * width);
            rest = others;
            if length == 0 {
                continue;
            }
            let mut seen = Seen::default();
            let mut after = Vec::with_capacity(if behind { stream.len() } else { 0 });
            let mut session = self.session_with(longest, self.decoder.config.rope_regime(length))?;
            let pieces = length.div_ceil(TRACED_ROWS);
            for (nth, piece) in stream.chunks(TRACED_ROWS * width).enumerate() {
                let before = Span { start: 0, len: nth * TRACED_ROWS };
                session.batch.clear();
                session.batch.push_rows(piece.len() / width, [before], before.len);
                self.decoder.backend.upload(piece, width, &mut session.ws.hidden)?;
                let mut observer = |moment, _: usize, ws: &Workspace<B>| {
                    if visitor.is_some() {
                        seen.keep(moment, ws, &*self.decoder.backend, pieces - nth)?;
                    }
                    Ok(progressing.tell()?)
                };
                if behind {
                    session.observed_pass(&self.decoder, at..at + 1, false, &mut observer)?;
                    after.extend(self.decoder.backend.download(&session.ws.hidden)?);
                } else {
                    session.observed_attention(&self.decoder, at, &mut observer)?;
                }
            }
            drop(session);
            if let Some(visitor) = &mut visitor {
                let [attention_input, q, k, v, attention] = &seen.0;
                visitor(&LayerTrace { layer_idx, sequence, hidden: stream, attention_input, q, k, v, attention })?;
            }
            if behind {
                stream.copy_from_slice(&after);
            }
        }
        Ok(())
    }

    /// The second half of layer `at` of this decoder: the rows of one sequence become those behind the layer, given what
    /// its `o_proj` reads, `[tokens, num_attention_heads * head_dim]`.
    pub(crate) fn trace_behind(
        &self,
        at: usize,
        stream: &mut [f32],
        attention: &[f32],
        progressing: &Progressing<'_>,
    ) -> Result<()> {
        let Some(block) = self.decoder.layers.get(at) else { return Ok(()) };
        let (hidden, features) = (
            self.decoder.config.hidden_size,
            block.self_attn.shape.num_attention_heads * block.self_attn.shape.head_dim,
        );
        let mut session = self.session();
        for (stream, attention) in stream.chunks_mut(TRACED_ROWS * hidden).zip(attention.chunks(TRACED_ROWS * features))
        {
            progressing.tell()?;
            self.decoder.backend.upload(stream, hidden, &mut session.ws.hidden)?;
            self.decoder.backend.upload(attention, features, &mut session.ws.attention)?;
            self.decoder.leave(at, &mut session.ws)?;
            stream.copy_from_slice(&self.decoder.backend.download(&session.ws.hidden)?);
        }
        Ok(())
    }
}
