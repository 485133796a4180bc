//! What a loaded model does: passes, scores, continuations, and how long they take.

use mqadapt_core::Progress;

use super::{Engine, Model};
use crate::run::hidden_states::{HiddenStates, LayerTrace};
use crate::run::score::{Likelihood, RequestStates};
use crate::{Error, GenerateOptions, Perplexity, Result};

impl Model {
    /// Seconds of each of some decode steps with `depth` tokens cached before the first, for one sequence or several side
    /// by side: the latency at that depth, without reading a text of that length first. Progress: steps.
    ///
    /// # Errors
    /// [`Error::Argument`] for no sequences, [`Error::Candle`], [`Error::Interrupted`].
    pub fn measure_decode(
        &self,
        depth: usize,
        steps: usize,
        sequences: usize,
        progress: &dyn Progress,
    ) -> Result<Vec<f64>> {
        on_backend!(&self.engine, runner => runner.measure_decode(depth, steps, sequences, progress))
    }

    /// Seconds of each of some passes over a prompt of this many tokens. Progress: passes.
    ///
    /// # Errors
    /// [`Error::Argument`] for no tokens, [`Error::Candle`], [`Error::Interrupted`].
    pub fn measure_prefill(&self, tokens: usize, passes: usize, progress: &dyn Progress) -> Result<Vec<f64>> {
        on_backend!(&self.engine, runner => runner.measure_prefill(tokens, passes, progress))
    }

    /// Logits of every position, `[ids.len(), vocab_size]`. Progress: tokens.
    ///
    /// # Errors
    /// [`Error::Token`], [`Error::Candle`], [`Error::Interrupted`], as every call below.
    pub fn logits(&self, ids: &[u32], progress: &dyn Progress) -> Result<Vec<f32>> {
        self.logits_in_steps(ids, &[], progress)
    }

    /// As [`Self::logits`], the sequence being fed through the K/V cache in pieces of these lengths
    /// (and what is left of it in one last piece).
    ///
    /// # Errors
    /// As [`Self::logits`].
    pub fn logits_in_steps(&self, ids: &[u32], steps: &[usize], progress: &dyn Progress) -> Result<Vec<f32>> {
        on_backend!(&self.engine, runner => runner.logits(ids, steps, progress))
    }

    /// What transformers calls `output_hidden_states`: the embeddings, the output of every layer but the last, and the
    /// final norm's output, each `[ids.len(), hidden_size]`.
    ///
    /// # Errors
    /// As [`Self::logits`].
    pub fn hidden_states(&self, ids: &[u32], progress: &dyn Progress) -> Result<Vec<Vec<f32>>> {
        on_backend!(&self.engine, runner => runner.hidden_states(ids, progress))
    }

    /// For each (context, continuation): the log-likelihood of the continuation, and whether it is what greedy
    /// decoding gives. What requests have in common is computed once, wherever they stand in the list.
    /// Progress: requests.
    ///
    /// # Errors
    /// As [`Self::logits`]; [`Error::Argument`] for an empty context.
    pub fn loglikelihood(&self, requests: &[(Vec<u32>, Vec<u32>)], progress: &dyn Progress) -> Result<Vec<Likelihood>> {
        on_backend!(&self.engine, runner => runner.loglikelihood(requests, progress))
    }

    /// As [`Self::loglikelihood`], for a sweep over plans: goes on from residual streams that an earlier call with the
    /// same requests kept (of a model with the same layers before `start.layer_idx()`), and keeps those that enter the
    /// layers `keep`. The results are those of [`Self::loglikelihood`], bit for bit.
    ///
    /// # Errors
    /// As [`Self::loglikelihood`]; [`Error::Argument`] for a layer of `keep` that is not run, or a `start` of other requests.
    pub fn loglikelihood_from(
        &self,
        requests: &[(Vec<u32>, Vec<u32>)],
        start: Option<&RequestStates>,
        keep: &[usize],
        progress: &dyn Progress,
    ) -> Result<(Vec<Likelihood>, Vec<RequestStates>)> {
        on_backend!(&self.engine, runner => runner.loglikelihood_from(requests, start, keep, progress))
    }

    /// Perplexity over non-overlapping windows of `context` tokens, the first `windows` of them (`None`: all; a rest
    /// shorter than a window is left out). Progress: windows.
    ///
    /// # Errors
    /// As [`Self::logits`]; [`Error::Argument`] where `context < 2` or the text is shorter than a window.
    pub fn perplexity(
        &self,
        ids: &[u32],
        context: usize,
        windows: Option<usize>,
        progress: &dyn Progress,
    ) -> Result<Perplexity> {
        let wrong = |name, detail: String| Err(Error::Argument { name, detail });
        if context < 2 {
            return wrong("context", format!("must be 2 or more, so that a token is predicted; found {context}"));
        }
        let count = (ids.len() / context).min(windows.unwrap_or(usize::MAX));
        if count == 0 {
            return wrong("ids", format!("must be a window of {context} tokens at least; found {}", ids.len()));
        }
        let windows: Vec<_> =
            ids.chunks_exact(context).take(count).map(|window| (window[..1].to_vec(), window[1..].to_vec())).collect();
        let scores = self.loglikelihood(&windows, progress)?;
        let window_nll: Vec<f64> = scores.iter().map(|(sum, _)| -sum / (context - 1) as f64).collect();
        let mean = window_nll.iter().sum::<f64>() / count as f64;
        Ok(Perplexity { perplexity: mean.exp(), tokens: count * (context - 1), window_nll })
    }

    /// Continues every prompt; the new tokens only. `on_token(index, token)` is told every new token in turn and ends its
    /// sequence by returning `false` (the token stays). Progress: sequences.
    ///
    /// # Errors
    /// As [`Self::logits`]; [`Error::Argument`] for an empty prompt or options that cannot be.
    pub fn generate(
        &self,
        prompts: &[Vec<u32>],
        options: &GenerateOptions,
        on_token: &mut dyn FnMut(usize, u32) -> bool,
        progress: &dyn Progress,
    ) -> Result<Vec<Vec<u32>>> {
        on_backend!(&self.engine, runner => runner.generate(prompts, options, on_token, progress))
    }

    /// Runs all sequences, layer by layer, and shows what every layer saw of every sequence. Returns the residual stream
    /// behind the last layer. Memory: the residual streams of all sequences. Progress: layers.
    ///
    /// # Errors
    /// As [`Self::logits`]; what the visitor returns.
    pub fn trace_layers<E: From<Error>>(
        &self,
        sequences: &[Vec<u32>],
        visitor: &mut dyn FnMut(&LayerTrace<'_>) -> std::result::Result<(), E>,
        progress: &dyn Progress,
    ) -> std::result::Result<HiddenStates, E> {
        on_backend!(&self.engine, runner => runner.trace_layers(sequences, visitor, progress))
    }

    /// The residual stream entering layer `layer_idx` (`num_hidden_layers`: behind the last). Progress: tokens.
    ///
    /// # Errors
    /// As [`Self::logits`]; [`Error::Argument`] for a layer that is not there.
    pub fn hidden_before(
        &self,
        layer_idx: usize,
        sequences: &[Vec<u32>],
        progress: &dyn Progress,
    ) -> Result<HiddenStates> {
        on_backend!(&self.engine, runner => runner.hidden_before(layer_idx, sequences, progress))
    }

    /// Goes on from a saved residual stream up to the entrance of layer `layer_idx`. Progress: tokens.
    ///
    /// # Errors
    /// As [`Self::hidden_before`].
    pub fn forward_from(
        &self,
        hidden: &HiddenStates,
        layer_idx: usize,
        progress: &dyn Progress,
    ) -> Result<HiddenStates> {
        on_backend!(&self.engine, runner => runner.forward_from(hidden, layer_idx, progress))
    }

    /// Negative log-likelihood in nats of every token but the first of each sequence, from the residual stream behind
    /// the last layer; `[sum of (length - 1)]`.
    ///
    /// # Errors
    /// As [`Self::logits`]; [`Error::Argument`] where the two do not fit.
    pub fn nll(&self, hidden: &HiddenStates, sequences: &[Vec<u32>], progress: &dyn Progress) -> Result<Vec<f64>> {
        on_backend!(&self.engine, runner => runner.nll(hidden, sequences, progress))
    }

    /// For every row, the Kullback-Leibler divergence of this model's next-token distribution from another's, in nats:
    /// `sum_i p_i (ln p_i - ln q_i)`, `p` of `reference` (the residual stream of the other model behind its last
    /// layer), `q` of `hidden`. Both go through this model's final norm and `lm_head`, a few rows at a time.
    /// Progress: tokens.
    ///
    /// # Errors
    /// As [`Self::logits`]; [`Error::Argument`] where the two do not fit.
    pub fn kl_divergence(
        &self,
        reference: &HiddenStates,
        hidden: &HiddenStates,
        progress: &dyn Progress,
    ) -> Result<Vec<f64>> {
        Ok(self.kl_divergences(reference, &[hidden], progress)?.swap_remove(0))
    }

    /// As [`Self::kl_divergence`], for several models at once, so that the reference's logits are computed once.
    ///
    /// # Errors
    /// As [`Self::kl_divergence`].
    pub fn kl_divergences(
        &self,
        reference: &HiddenStates,
        hidden: &[&HiddenStates],
        progress: &dyn Progress,
    ) -> Result<Vec<Vec<f64>>> {
        on_backend!(&self.engine, runner => runner.kl_divergences(reference, hidden, progress))
    }
}
