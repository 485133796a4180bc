//! One target head: the source K/V heads it replaces and their query heads.

use faer::Mat;

use crate::algebra::dot;
use crate::layer::{LayerGeometry, LayerWeights, output_head};
use crate::statistics::{LayerStatistics, Moment};

/// The K/V heads `members` become one.
pub(crate) struct Group<'a> {
    pub(crate) geometry: &'a LayerGeometry,
    pub(crate) statistics: &'a LayerStatistics,
    pub(crate) members: &'a [usize],
}

impl Group<'_> {
    /// Query heads, members in order.
    pub(crate) fn query_heads(&self) -> Vec<usize> {
        let r = self.geometry.num_key_value_groups();
        self.members.iter().flat_map(|g| g * r..(g + 1) * r).collect()
    }

    /// Position in `members` of the `i`-th query head of [`Self::query_heads`].
    pub(crate) fn slot(&self, i: usize) -> usize {
        i / self.geometry.num_key_value_groups()
    }

    /// `O_hT O_h` of every query head.
    pub(crate) fn output_metrics(&self, weights: &LayerWeights) -> Vec<Mat<f64>> {
        let g = self.geometry;
        self.query_heads()
            .into_iter()
            .map(|h| {
                let o = output_head(&weights.o_proj, h, g.num_attention_heads, g.head_dim, g.hidden_size);
                o.transpose() * &o
            })
            .collect()
    }

    /// Sum of `weights[i] * stacked(moment, i)`, divided by the sum of weights.
    pub(crate) fn pooled(stacked: &[Mat<f64>], weights: &[f64]) -> Mat<f64> {
        let n = stacked.first().map_or(0, Mat::nrows);
        let total: f64 = weights.iter().sum::<f64>().max(1e-300);
        let mut sum = Mat::<f64>::zeros(n, n);
        for (matrix, weight) in stacked.iter().zip(weights) {
            sum += faer::Scale(weight / total) * matrix;
        }
        sum
    }

    /// A stacked moment of every query head.
    pub(crate) fn stacked(&self, moment: Moment) -> Vec<Mat<f64>> {
        self.query_heads().into_iter().map(|h| self.statistics.stacked(moment, h, self.members)).collect()
    }

    /// `E |s_h|^2` in the metric of `o_proj`: the energy of each query head's output.
    pub(crate) fn output_energy(&self, metrics: &[Mat<f64>], outputs: &[Mat<f64>]) -> Vec<f64> {
        let d = self.geometry.head_dim;
        let own = |i: usize| outputs[i].submatrix(self.slot(i) * d, self.slot(i) * d, d, d);
        (0..metrics.len()).map(|i| dot(metrics[i].as_ref(), own(i)).max(0.0)).collect()
    }
}
