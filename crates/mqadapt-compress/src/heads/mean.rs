//! The mean of the group's heads (GQA paper, arXiv 2305.13245, section 2.1).

use crate::heads::row_merge::{MergeOptions, RowMerge, RowsAt};

/// Values summed at a time, so that the f64 sums stay in the L1 cache.
const BLOCK: usize = 512;

pub(crate) struct Mean;

/// Sums in f64: equal heads then come back bit for bit whatever their number, and the result is the exact mean, rounded once.
impl RowMerge for Mean {
    fn merge(&self, _options: &MergeOptions, _at: RowsAt, heads: &[&[f32]], out: &mut [f32]) {
        let count = heads.len() as f64;
        let mut sums = [0.0f64; BLOCK];
        for (block, out) in out.chunks_mut(BLOCK).enumerate() {
            let sums = &mut sums[..out.len()];
            sums.fill(0.0);
            for head in heads {
                for (sum, value) in sums.iter_mut().zip(&head[block * BLOCK..]) {
                    *sum += f64::from(*value);
                }
            }
            for (out, sum) in out.iter_mut().zip(sums) {
                *out = (*sum / count) as f32;
            }
        }
    }
}
