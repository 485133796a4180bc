//! Where fast rotary pairs end and slow ones begin.

use crate::algebra::count;
use mqadapt_core::AttentionShape;

/// How the cut is chosen: pairs below it keep their frequency alone, pairs from
/// it on are mixed with each other. A low cut wins at short contexts and loses
/// at long ones.
#[derive(Clone, Debug, PartialEq)]
pub enum Cut {
    /// This many fast pairs (no more than the layer has).
    Pairs(usize),
    /// From the longest of these contexts, in tokens: pairs of which a quarter
    /// wavelength is shorter are fast.
    Context(Vec<usize>),
    /// Measured for each layer on the sequences of a [`super::Measurement`].
    Measured,
}

/// Fast pairs for a context of `tokens`: for `inv_freq = theta^(-2j/d)` this is
/// `round(d/2 * ln(4 tokens / 2 pi) / ln theta)`; it holds for scaled frequencies too.
pub(crate) fn context_cut(geometry: &AttentionShape, tokens: usize) -> usize {
    let limit = std::f64::consts::TAU / (4.0 * count(tokens.max(1)));
    let freq = &geometry.inv_freq;
    // pair j counts as fast where the frequency half a pair further is still above the limit
    let half = |j: usize| {
        let next = match freq.get(j + 1) {
            Some(next) => *next,
            None if j > 0 => freq[j] * freq[j] / freq[j - 1],
            None => freq[j],
        };
        (freq[j] * next).sqrt()
    };
    (0..freq.len()).take_while(|j| half(*j) > limit).count()
}

/// Cuts worth measuring.
pub(crate) fn candidates(geometry: &AttentionShape) -> Vec<usize> {
    let pairs = geometry.rotary_pairs();
    let mut cuts: Vec<usize> = [10, 12, 14, 16, 18, 20, 22, 24, 28, 32].iter().map(|c| (c * pairs + 16) / 32).collect();
    cuts.dedup();
    cuts
}
