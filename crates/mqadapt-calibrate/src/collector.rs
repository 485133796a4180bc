//! The statistics of one layer, summed while a stream goes through it.

use mqadapt_compress::{Accumulator, Moment, Needs, StatisticsShape};
use mqadapt_core::AttentionShape;
use mqadapt_core::Progressing;

use crate::calibration::{Calibration, LayerSample};
use crate::{Error, Result};

/// Most bytes of one layer's sums, unless a plan needs more.
const STATISTICS_BYTES: usize = 512 << 20;

/// K/V heads whose joint moments are kept: all of them where that is no more than half a gigabyte, else the most that is,
/// and in any case the `members` that a plan merges at a time.
pub(crate) fn block_heads(geometry: &AttentionShape, members: usize, moments: &'static [Moment]) -> usize {
    let fits = |block: &usize| {
        let shape = StatisticsShape::new(geometry, Some(*block)).map(|shape| shape.with_moments(moments));
        *block <= members || shape.is_ok_and(|shape| shape.bytes() <= STATISTICS_BYTES)
    };
    let (kv, members) = (geometry.num_key_value_heads, members.max(1));
    let mut blocks = (1..=kv).rev().filter(|block| kv.is_multiple_of(*block) && block.is_multiple_of(members));
    blocks.find(fits).unwrap_or(kv)
}

/// Sums the statistics of one layer while a stream goes through it.
pub(crate) struct Collector {
    layer_idx: usize,
    sums: Accumulator,
    wanted: Vec<(usize, usize)>,
    inputs: Vec<Vec<f32>>,
    hidden_size: usize,
}

impl Collector {
    pub(crate) fn new(
        geometry: &AttentionShape,
        o_proj: &[f32],
        calibration: &Calibration,
        layer_idx: usize,
        members: usize,
        needs: Needs,
    ) -> Result<Self> {
        let block = block_heads(geometry, members, needs.moments);
        let sums = Accumulator::new(geometry.clone(), o_proj, Some(block)).map_err(Error::merge(layer_idx))?;
        let sums = sums.with_moments(needs.moments);
        let wanted = if needs.inputs { calibration.measured() } else { Vec::new() };
        let inputs = vec![Vec::new(); wanted.len()];
        Ok(Self { layer_idx, sums, wanted, inputs, hidden_size: geometry.hidden_size })
    }

    pub(crate) fn add(&mut self, trace: &mqadapt_model::LayerTrace<'_>, progress: &Progressing<'_>) -> Result<()> {
        for ((sequence, tokens), input) in self.wanted.iter().zip(&mut self.inputs) {
            if *sequence == trace.sequence {
                input.extend_from_slice(&trace.attention_input[..tokens * self.hidden_size]);
            }
        }
        let added = self.sums.add_sequence(trace.q, trace.k, trace.v, progress);
        added.map(drop).map_err(Error::merge(self.layer_idx))
    }

    pub(crate) fn finish(self) -> LayerSample {
        LayerSample { statistics: self.sums.finish(), inputs: self.inputs }
    }
}
