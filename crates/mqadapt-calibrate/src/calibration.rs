//! Calibration text, and what is known of a layer from it.

use std::collections::BTreeSet;

use mqadapt_compress::LayerStatistics;

use crate::{Error, Result};

/// Tokens of each target context on which cuts are measured.
const MEASURED_TOKENS: usize = 1536;
/// Contexts that a model is converted for where none are named.
const USUAL_CONTEXTS: [usize; 2] = [512, 2048];

/// Calibration text, and the contexts that the converted model is for.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// Token ids, each sequence from position 0.
    pub sequences: Vec<Vec<u32>>,
    /// Contexts in tokens that decide between fast and slow rotary pairs.
    pub target_contexts: Vec<usize>,
}

impl Calibration {
    /// The target contexts of a text whose longest window has `longest` tokens, where none are named: 512 and 2048 as far as
    /// the window reaches, else its length.
    #[must_use]
    pub fn usual_contexts(longest: usize) -> Vec<usize> {
        let reached: Vec<usize> = USUAL_CONTEXTS.into_iter().filter(|context| *context <= longest).collect();
        if reached.is_empty() { vec![longest] } else { reached }
    }

    /// The lengths of the sequences in tokens, ascending, each of them once.
    #[must_use]
    pub fn lengths(&self) -> Vec<usize> {
        let lengths: BTreeSet<usize> = self.sequences.iter().map(Vec::len).filter(|length| *length > 0).collect();
        lengths.into_iter().collect()
    }

    /// Checks that windows of these lengths reach every target context.
    ///
    /// # Errors
    /// [`Error::Argument`] with the context that is longer than all of them.
    pub fn check_target_contexts(&self, lengths: &[usize]) -> Result<()> {
        let Some(longest) = lengths.iter().max() else { return Ok(()) };
        let Some(context) = self.target_contexts.iter().find(|context| *context > longest) else { return Ok(()) };
        let detail = format!(
            "is {context} tokens, but the longest window of the calibration text has {longest}; draw windows of {context} \
             tokens (--calibration-context), or choose a target context of at most {longest} (--target-context)"
        );
        Err(Error::Argument { name: "target_context", detail })
    }

    /// Sequences by index and the tokens of each that serve to measure a layer's cut: of every target context about
    /// [`MEASURED_TOKENS`], one sequence at least. Sequences of that very length come before longer ones, which are cut short;
    /// they are taken from all over the text. Where none is as long, the longest ones serve.
    pub(crate) fn measured(&self) -> Vec<(usize, usize)> {
        let mut out = Vec::new();
        for &context in self.target_contexts.iter().filter(|context| **context > 0) {
            let of = |fits: fn(&usize, &usize) -> bool| -> Vec<usize> {
                (0..self.sequences.len()).filter(|i| fits(&self.sequences[*i].len(), &context)).collect()
            };
            let mut fitting = of(usize::eq);
            if fitting.is_empty() {
                fitting = of(usize::gt);
            }
            let wanted = (MEASURED_TOKENS / context).max(1).min(fitting.len());
            out.extend((0..wanted).map(|nth| (fitting[(2 * nth + 1) * fitting.len() / (2 * wanted)], context)));
        }
        if out.is_empty() {
            // no sequence reaches a target context: the longest ones, as they are
            let mut longest: Vec<usize> =
                (0..self.sequences.len()).filter(|i| !self.sequences[*i].is_empty()).collect();
            longest.sort_by_key(|i| std::cmp::Reverse(self.sequences[*i].len()));
            let mut tokens = 0;
            for i in longest {
                if tokens >= MEASURED_TOKENS {
                    break;
                }
                tokens += self.sequences[i].len();
                out.push((i, self.sequences[i].len()));
            }
        }
        out
    }
}

/// What is known of one layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSample {
    /// Sums over the calibration text.
    pub statistics: LayerStatistics,
    /// Inputs on which cuts are measured, `[tokens, hidden_size]` each.
    pub inputs: Vec<Vec<f32>>,
}

impl LayerSample {
    /// The inputs for some target contexts: those of that length, or else longer ones cut short; none at all where a context
    /// has none, since what is measured at the others would decide for it too. And the rest of them; none are left.
    pub(crate) fn take_inputs_for(
        &mut self,
        target_contexts: &[usize],
        hidden_size: usize,
    ) -> (Vec<Vec<f32>>, Vec<Vec<f32>>) {
        let wanted: Vec<usize> = target_contexts.iter().map(|context| context * hidden_size).collect();
        let inputs = std::mem::take(&mut self.inputs);
        let mut out = Vec::new();
        for &values in wanted.iter().filter(|values| inputs.iter().all(|input| input.len() != **values)) {
            let longer = inputs.iter().filter(|input| input.len() > values);
            let before = out.len();
            out.extend(longer.map(|input| input[..values].to_vec()));
            if out.len() == before {
                return (Vec::new(), inputs);
            }
        }
        let (of_length, rest): (Vec<_>, Vec<_>) = inputs.into_iter().partition(|input| wanted.contains(&input.len()));
        out.extend(of_length);
        (out, rest)
    }
}

#[cfg(test)]
mod tests {
    use mqadapt_compress::{LayerStatistics, StatisticsShape};
    use mqadapt_core::AttentionShape;

    use super::{Calibration, LayerSample};

    #[test]
    fn inputs_serve_shorter_contexts_than_they_were_taken_for() {
        let geometry = AttentionShape {
            num_attention_heads: 2,
            num_key_value_heads: 2,
            head_dim: 2,
            hidden_size: 4,
            inv_freq: vec![1.0],
            rotary_factor: 1.0,
            scaling: 1.0,
            qk_norm: false,
            sliding_window: None,
            attn_logit_softcapping: None,
        };
        let statistics = LayerStatistics::zeros(StatisticsShape::new(&geometry, None).unwrap());
        let inputs = vec![vec![1.0; 8], vec![2.0; 8], vec![3.0; 20]];
        let lengths = |contexts: &[usize]| -> Vec<usize> {
            let mut sample = LayerSample { statistics: statistics.clone(), inputs: inputs.clone() };
            let (taken, _) = sample.take_inputs_for(contexts, 4);
            assert!(sample.inputs.is_empty());
            taken.iter().map(|input| input.len() / 4).collect()
        };
        assert_eq!(lengths(&[2]), [2, 2]);
        assert_eq!(lengths(&[2, 5]), [2, 2, 5]);
        assert_eq!(lengths(&[3]), [3]);
        assert_eq!(lengths(&[1]), [1, 1, 1]);
        assert!(lengths(&[6]).is_empty());
        assert!(lengths(&[2, 6]).is_empty(), "a cut for 6 tokens is not decided by what 2 show");
    }

    fn text(lengths: &[usize], target_contexts: &[usize]) -> Calibration {
        let sequences = lengths.iter().map(|length| vec![0; *length]).collect();
        Calibration { sequences, target_contexts: target_contexts.to_vec() }
    }

    #[test]
    fn cuts_are_measured_on_windows_of_their_context() {
        let mixed = text(&[512, 2048, 512, 512, 512, 2048, 512, 512], &[512, 2048]);
        assert_eq!(mixed.measured(), [(2, 512), (4, 512), (7, 512), (5, 2048)]);
        // longer ones serve where there are none of that length; where none is as long, the longest as they are, which are
        // no measure of a cut but of what a merge costs
        assert_eq!(text(&[2048, 512, 2048], &[1024]).measured(), [(2, 1024)]);
        assert_eq!(text(&[300, 2048], &[512]).measured(), [(1, 512)]);
        assert_eq!(text(&[300], &[512]).measured(), [(0, 300)]);
    }

    #[test]
    fn contexts_follow_the_windows() {
        assert_eq!(Calibration::usual_contexts(4096), [512, 2048]);
        assert_eq!(Calibration::usual_contexts(2047), [512]);
        assert_eq!(Calibration::usual_contexts(256), [256]);
        let mixed = text(&[512, 0, 2048, 512], &[512, 2048]);
        assert_eq!(mixed.lengths(), [512, 2048]);
        mixed.check_target_contexts(&mixed.lengths()).unwrap();
        let message = mixed.check_target_contexts(&[256, 300]).unwrap_err().to_string();
        assert!(message.contains("512 tokens") && message.contains("has 300"), "{message}");
    }
}
