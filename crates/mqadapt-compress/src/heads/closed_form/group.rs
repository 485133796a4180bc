//! One target head: the source K/V heads it replaces and their query heads.

use faer::{Mat, MatRef, c64};
use mqadapt_core::Progressing;

use crate::Error;
use crate::algebra::{count, dot};
use crate::heads::closed_form::prior::Prior;
use crate::layer::{LayerWeights, output_head};
use crate::statistics::{LayerStatistics, Moment};
use mqadapt_core::AttentionShape;

/// The K/V heads `members` become one.
#[derive(Clone, Copy)]
pub(crate) struct Group<'a> {
    pub(crate) geometry: &'a AttentionShape,
    pub(crate) statistics: &'a LayerStatistics,
    pub(crate) members: &'a [usize],
    /// What moments are taken together with; none: they are as they were summed.
    pub(crate) prior: Option<&'a Prior>,
    /// Asked between query heads.
    pub(crate) progress: &'a Progressing<'a>,
}

/// Query heads of some K/V heads, in their order.
pub(crate) fn query_heads(members: &[usize], geometry: &AttentionShape) -> Vec<usize> {
    let r = geometry.num_key_value_groups();
    members.iter().flat_map(|g| g * r..(g + 1) * r).collect()
}

impl Group<'_> {
    /// Query heads, members in order.
    pub(crate) fn query_heads(&self) -> Vec<usize> {
        query_heads(self.members, self.geometry)
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

    /// A stacked moment of every query head, of these dims of each member.
    pub(crate) fn stacked(&self, moment: Moment, dims: Vec<usize>) -> Stacked<'_> {
        let n = self.members.len() * dims.len();
        let heads = self.query_heads();
        let mut stacked = Stacked { group: self, moment, dims, heads, held: Vec::new() };
        if 8 * n * n * stacked.len() <= HELD_BYTES {
            stacked.held = (0..stacked.len()).map(|i| stacked.make(i)).collect();
        }
        stacked
    }

    /// A stacked moment of a query head, of these dims of each member.
    pub(crate) fn moment(&self, moment: Moment, head: usize, dims: &[usize]) -> Mat<f64> {
        let mut sum = self.statistics.stacked(moment, head, self.members, dims);
        if let Some(prior) = self.prior {
            prior.add_to(&mut sum, moment, self.members, dims);
        }
        sum
    }

    /// `E[z zH]` of the members' rotated keys at a pair.
    pub(crate) fn rotated_pair(&self, head: usize, pair: usize) -> Mat<c64> {
        let mut sum = self.statistics.rotated_pair(head, pair, self.members);
        if let Some(prior) = self.prior {
            prior.add_to_pair(&mut sum, pair, self.geometry.rotary_pairs(), self.members);
        }
        sum
    }

    /// All dims of a head.
    pub(crate) fn all_dims(&self) -> Vec<usize> {
        (0..self.geometry.head_dim).collect()
    }

    /// The block of a stacked moment that is the own K/V head's of the `i`-th query head.
    pub(crate) fn own_block(&self, moment: Moment, i: usize) -> Mat<f64> {
        let head = self.query_heads()[i];
        self.statistics.stacked(moment, head, &self.members[self.slot(i)..=self.slot(i)], &self.all_dims())
    }

    /// `E |s_h|^2` in the metric of `o_proj`: the energy of each query head's output.
    pub(crate) fn output_energy(&self, metrics: &[Mat<f64>]) -> Vec<f64> {
        let energy = |i: usize| dot(metrics[i].as_ref(), self.own_block(Moment::ValueOutput, i).as_ref()).max(0.0);
        (0..metrics.len()).map(energy).collect()
    }
}

/// Most bytes of one group's moments that are unfolded at a time.
const HELD_BYTES: usize = 64 << 20;

/// A stacked moment of every query head of a group: unfolded all at once where that is little, one by one where not.
pub(crate) struct Stacked<'a> {
    group: &'a Group<'a>,
    moment: Moment,
    dims: Vec<usize>,
    heads: Vec<usize>,
    held: Vec<Mat<f64>>,
}

impl Stacked<'_> {
    /// Query heads.
    pub(crate) fn len(&self) -> usize {
        self.heads.len()
    }

    fn make(&self, i: usize) -> Mat<f64> {
        self.group.moment(self.moment, self.heads[i], &self.dims)
    }

    /// Hands out the moment of the `i`-th query head.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub(crate) fn with<T>(&self, i: usize, f: impl FnOnce(MatRef<'_, f64>) -> T) -> Result<T, Error> {
        self.group.progress.tell()?;
        Ok(match self.held.get(i) {
            Some(held) => f(held.as_ref()),
            None => f(self.make(i).as_ref()),
        })
    }

    /// Sum of the moments by their weights, divided by the sum of weights.
    pub(crate) fn pooled(&self, weights: &[f64]) -> Result<Mat<f64>, Error> {
        let n = self.group.members.len() * self.dims.len();
        let total: f64 = weights.iter().sum();
        let mut sum = Mat::<f64>::zeros(n, n);
        // heads none of which weighs anything weigh the same
        let (weights, total) =
            if total > 0.0 { (weights, total) } else { (&vec![1.0; weights.len()][..], count(weights.len())) };
        for (i, weight) in weights.iter().enumerate() {
            self.with(i, |moment| sum += faer::Scale(weight / total) * moment)?;
        }
        Ok(sum)
    }
}
