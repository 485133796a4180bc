//! Choosing a token from logits: temperature, then top-k, then top-p (the order of transformers), then a seeded draw.

use crate::options::GenerateOptions;

/// Draws tokens. Its buffers are reused.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    candidates: Vec<(f32, u32)>,
}

impl Sampler {
    /// A token for `logits`, `[vocab_size]`. The draw depends on the seed, the sequence's index and the step only.
    pub(crate) fn draw(&mut self, logits: &[f32], options: &GenerateOptions, sequence: usize, step: usize) -> u32 {
        let candidates = &mut self.candidates;
        candidates.clear();
        candidates.extend(logits.iter().copied().zip(0..));
        // most likely first, the smaller id first among equals: a fixed order whatever the selection below does
        let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
        if let Some(k) = options.top_k.filter(|&k| k < candidates.len()) {
            candidates.select_nth_unstable_by(k - 1, order);
            candidates.truncate(k);
        }
        if options.top_p.is_some() || options.top_k.is_some() {
            candidates.sort_unstable_by(order);
        }
        let top = candidates.iter().map(|c| c.0).fold(f32::NEG_INFINITY, f32::max);
        let mut total = 0.0;
        for (value, _) in candidates.iter_mut() {
            *value = (f64::from(*value - top) / options.temperature).exp() as f32;
            total += f64::from(*value);
        }
        if let Some(top_p) = options.top_p.filter(|&p| p < 1.0) {
            let mut sum = 0.0;
            let enough = candidates.iter().position(|c| {
                sum += f64::from(c.0);
                sum >= top_p * total
            });
            if let Some(last) = enough {
                candidates.truncate(last + 1);
                total = sum;
            }
        }
        let mut left = uniform(options.seed, sequence as u64, step as u64) * total;
        for &(weight, token) in candidates.iter() {
            left -= f64::from(weight);
            if left < 0.0 {
                return token;
            }
        }
        // rounding left a crumb behind: the last token that can be drawn
        candidates.iter().rfind(|c| c.0 > 0.0).map_or(0, |c| c.1)
    }
}

/// A number in `[0, 1)` for a draw: a counter, not a state, so that sequences do not disturb each other.
fn uniform(seed: u64, sequence: u64, step: u64) -> f64 {
    let bits = mix(seed ^ mix(sequence ^ mix(step)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// The finaliser of `SplitMix64` (Steele, Lea and Flood 2014) on the next point of its sequence.
fn mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(options: &GenerateOptions) -> [f64; 4] {
        let logits = [1.0f32, 3.0, 2.0, -1.0].map(|x| x * 2.0);
        let (mut sampler, mut counts) = (Sampler::default(), [0.0; 4]);
        for step in 0..20_000 {
            counts[sampler.draw(&logits, options, 1, step) as usize] += 1.0 / 20_000.0;
        }
        counts
    }

    /// Temperature 2 undoes the doubling, so the probabilities are those of softmax(1, 3, 2, -1).
    #[test]
    fn draws_follow_the_distribution() {
        let exact = [1.0f64, 3.0, 2.0, -1.0].map(f64::exp);
        let options = GenerateOptions { temperature: 2.0, seed: 5, ..GenerateOptions::default() };
        for (options, kept) in [
            (options.clone(), vec![0, 1, 2, 3]),
            (GenerateOptions { top_k: Some(2), ..options.clone() }, vec![1, 2]),
            // 0.657 alone is not 0.7; with 0.242 it is
            (GenerateOptions { top_p: Some(0.7), ..options.clone() }, vec![1, 2]),
            (GenerateOptions { top_p: Some(0.6), ..options }, vec![1]),
        ] {
            let total: f64 = kept.iter().map(|&i| exact[i]).sum();
            let found = frequencies(&options);
            for token in 0..4 {
                let expected = if kept.contains(&token) { exact[token] / total } else { 0.0 };
                // five standard errors of 20,000 draws, at most 0.0035 each
                assert!((found[token] - expected).abs() < 0.018, "{options:?} {found:?} {expected}");
            }
        }
    }

    #[test]
    fn draws_are_seeded() {
        let logits: Vec<f32> = (0..100u8).map(|i| f32::from(i % 7)).collect();
        let draws = |seed, sequence| {
            let options = GenerateOptions { temperature: 1.0, seed, ..GenerateOptions::default() };
            (0..50).map(|step| Sampler::default().draw(&logits, &options, sequence, step)).collect::<Vec<_>>()
        };
        assert_eq!(draws(1, 0), draws(1, 0));
        assert!(draws(1, 0) != draws(2, 0) && draws(1, 0) != draws(1, 1));
    }
}
