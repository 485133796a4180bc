//! Tables of the rotary embedding, computed in f64, kept in f32.

use mqadapt_core::Rope;

/// Positions are added by this many at least.
const STEP: usize = 512;

/// Cosines and sines of every position so far, `[positions, pairs]`.
#[derive(Debug)]
pub(crate) struct RopeTable {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
    /// `head_dim / 2`
    pub pairs: usize,
    inv_freq: Vec<f64>,
}

impl RopeTable {
    pub(crate) fn new(rope: &Rope) -> Self {
        let inv_freq = rope.inv_freq();
        Self { cos: Vec::new(), sin: Vec::new(), pairs: inv_freq.len(), inv_freq }
    }

    /// Makes sure of the positions below `end`.
    pub(crate) fn reach(&mut self, end: usize) {
        let have = self.cos.len() / self.pairs;
        if end <= have {
            return;
        }
        for position in have..end.next_multiple_of(STEP) {
            for inv_freq in &self.inv_freq {
                let (sin, cos) = (position as f64 * inv_freq).sin_cos();
                self.cos.push(cos as f32);
                self.sin.push(sin as f32);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use mqadapt_core::RopeScaling;

    use super::*;

    #[test]
    fn grows_and_keeps() {
        let mut table = RopeTable::new(&Rope { theta: 100.0, scaling: RopeScaling::None, head_dim: 4 });
        table.reach(1);
        let first = table.cos.clone();
        table.reach(STEP + 1);
        assert_eq!((table.cos.len(), &table.cos[..first.len()]), (2 * 2 * STEP, &first[..]));
        // pair 1 of position 3: 3 * 100^(-1/2)
        assert_eq!(table.sin[3 * 2 + 1], 0.3f64.sin() as f32);
    }
}
