//! Calibration text, and what is known of a layer from it.

use mqadapt_merge::LayerStatistics;

/// Tokens of each target context on which cuts are measured.
const MEASURED_TOKENS: usize = 1536;

/// Calibration text, and the contexts that the converted model is for.
#[derive(Debug, Clone, PartialEq)]
pub struct Calibration {
    /// Token ids, each sequence from position 0.
    pub sequences: Vec<Vec<u32>>,
    /// Contexts in tokens that decide between fast and slow rotary pairs.
    pub target_contexts: Vec<usize>,
}

impl Calibration {
    /// Sequences by index and the tokens of each that serve to measure a layer's cut: of every target context about
    /// [`MEASURED_TOKENS`], one sequence at least; where none is as long, so many of the longest.
    pub(crate) fn measured(&self) -> Vec<(usize, usize)> {
        let mut out = Vec::new();
        let mut next = 0;
        for &context in &self.target_contexts {
            let fitting: Vec<usize> =
                (0..self.sequences.len()).filter(|i| self.sequences[*i].len() >= context).collect();
            if context == 0 || fitting.is_empty() {
                continue;
            }
            let wanted = (MEASURED_TOKENS / context).clamp(1, fitting.len());
            for _ in 0..wanted {
                out.push((fitting[next % fitting.len()], context));
                next += 1;
            }
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
    /// The inputs for some target contexts: those of that length, or else longer ones cut short. And the rest of them; none
    /// are left.
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
            out.extend(longer.map(|input| input[..values].to_vec()));
        }
        let (of_length, rest): (Vec<_>, Vec<_>) = inputs.into_iter().partition(|input| wanted.contains(&input.len()));
        out.extend(of_length);
        (out, rest)
    }
}

#[cfg(test)]
mod tests {
    use mqadapt_merge::{LayerGeometry, LayerStatistics, StatisticsShape};

    use super::LayerSample;

    #[test]
    fn inputs_serve_shorter_contexts_than_they_were_taken_for() {
        let geometry = LayerGeometry {
            num_attention_heads: 2,
            num_key_value_heads: 2,
            head_dim: 2,
            hidden_size: 4,
            inv_freq: vec![1.0],
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
    }
}
