//! Pruning: the strongest head of a group stays, the others' query heads fall
//! silent. The default of NVIDIA's Puzzle, and the baseline others use.

use mqadapt_core::{AttentionShape, Progressing};

use crate::Error;
use crate::heads::closed_form::LayerReport;
use crate::layer::{LayerWeights, check_target};
use crate::layer_merge::{LayerJob, LayerMerge, MethodOption, Needs};
use crate::statistics::LayerStatistics;

/// The method.
pub(crate) struct Prune;

impl LayerMerge for Prune {
    fn needs(&self) -> Needs {
        Needs { moments: &[], inputs: false }
    }

    fn options(&self) -> &'static [MethodOption] {
        &[]
    }

    fn merge(&self, job: LayerJob<'_>, _progress: &Progressing<'_>) -> Result<(LayerWeights, LayerReport), Error> {
        let num_key_value_heads = job.cache.num_key_value_heads();
        let (weights, kept) = prune(job.weights, job.shape, num_key_value_heads, job.statistics)?;
        Ok((weights, LayerReport { num_key_value_heads, kept: Some(kept), ..LayerReport::default() }))
    }
}

/// Keeps of every contiguous group the K/V head whose query heads together add
/// the vectors of largest mean L2 norm to the output of `o_proj`, and zeroes the
/// `o_proj` columns of the query heads that lose theirs. Returns the kept heads too.
///
/// # Errors
/// [`Error::Target`], [`Error::Shape`] or [`Error::StatisticsMismatch`].
pub fn prune(
    weights: &LayerWeights,
    geometry: &AttentionShape,
    target: usize,
    statistics: &LayerStatistics,
) -> Result<(LayerWeights, Vec<usize>), Error> {
    check_target(geometry, target)?;
    weights.validate(geometry, geometry.num_key_value_heads)?;
    statistics.check(geometry, 1, &[])?;
    let (d, hidden, r) = (geometry.head_dim, geometry.hidden_size, geometry.num_key_value_groups());
    let size = geometry.num_key_value_heads / target;
    let kept: Vec<usize> = (0..target)
        .map(|t| {
            // the first of equals, whatever the order of comparison
            let strongest = |a: usize, b: usize| {
                if statistics.mean_contribution(b) > statistics.mean_contribution(a) { b } else { a }
            };
            (t * size..(t + 1) * size).reduce(strongest).unwrap_or(t * size)
        })
        .collect();
    let order: Vec<usize> = (0..geometry.num_attention_heads).collect();
    let mut pruned = weights.permute(geometry, &order, &kept);
    for row in pruned.o_proj.chunks_exact_mut(order.len() * d).take(hidden) {
        for (head, columns) in row.chunks_exact_mut(d).enumerate() {
            if !kept.contains(&(head / r)) {
                columns.fill(0.0);
            }
        }
    }
    Ok((pruned, kept))
}

#[cfg(test)]
mod tests {
    use super::{Prune, prune};
    use crate::LayerMerge;
    use crate::heads::closed_form::tests::{Noise, geometry, inputs, random_layer, statistics, statistics_of};

    #[test]
    fn keeps_the_strongest_head_of_each_group() {
        let geometry = geometry(8, 4, 4, 2);
        let mut noise = Noise(31);
        let mut weights = random_layer(&geometry, true, &mut noise);
        let head = 4 * geometry.hidden_size;
        weights.v_proj[head..3 * head].iter_mut().for_each(|v| *v *= 20.0); // heads 1 and 2
        let sums = statistics(&weights, &geometry, &inputs(&geometry, &[50], &mut noise));
        let (pruned, kept) = prune(&weights, &geometry, 2, &sums).unwrap();
        assert_eq!(kept, [1, 2]);
        assert_eq!(pruned.k_proj, weights.k_proj[head..3 * head]);
        assert_eq!(pruned.v_proj_bias, Some(weights.v_proj_bias.as_ref().unwrap()[4..12].to_vec()));
        assert_eq!((&pruned.q_proj, &pruned.q_proj_bias), (&weights.q_proj, &weights.q_proj_bias));
        for (pruned, source) in pruned.o_proj.chunks_exact(32).zip(weights.o_proj.chunks_exact(32)) {
            assert!(pruned[..8].iter().chain(&pruned[24..]).all(|v| *v == 0.0)); // query heads of 0 and 3
            assert_eq!(pruned[8..24], source[8..24]);
        }
    }

    #[test]
    fn needs_contributions_only() {
        let geometry = geometry(8, 4, 4, 2);
        let weights = random_layer(&geometry, false, &mut Noise(34));
        let x = inputs(&geometry, &[60, 7], &mut Noise(35));
        let all = statistics(&weights, &geometry, &x);
        let few = statistics_of(&weights, &geometry, &x, Prune.needs().moments);
        assert_eq!(few.shape().bytes(), 0);
        for head in 0..4 {
            let (few, all) = (few.mean_contribution(head), all.mean_contribution(head));
            assert!((few - all).abs() < 1e-6 * all, "{few} {all}"); // the same products, summed in another order
        }
        assert_eq!(prune(&weights, &geometry, 2, &few).unwrap(), prune(&weights, &geometry, 2, &all).unwrap());
        let refused = crate::heads::closed_form::predicted_error(
            &weights,
            &geometry,
            2,
            &few,
            crate::heads::closed_form::FixedMerge::Mean,
            512,
        );
        assert!(refused.unwrap_err().to_string().contains("no moment `query`"));
    }

    /// The mean norm against its definition.
    #[test]
    fn contributions_are_mean_norms() {
        let geometry = geometry(4, 2, 4, 2);
        let weights = random_layer(&geometry, false, &mut Noise(32));
        let x = inputs(&geometry, &[40, 9], &mut Noise(33));
        let sums = statistics(&weights, &geometry, &x);
        for g in 0..2 {
            let mut silent = weights.clone();
            for row in silent.o_proj.chunks_exact_mut(16) {
                row[(1 - g) * 8..(2 - g) * 8].fill(0.0);
            }
            let norms: f64 = x
                .iter()
                .flat_map(|x| {
                    let y = crate::heads::closed_form::outputs(
                        &silent,
                        &geometry,
                        2,
                        x,
                        &mqadapt_core::Progressing::UNWATCHED,
                    )
                    .unwrap();
                    y.chunks_exact(40)
                        .map(|y| y.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt())
                        .collect::<Vec<_>>()
                })
                .sum();
            assert!((sums.mean_contribution(g) - norms / 49.0).abs() < 1e-4 * norms / 49.0);
        }
    }
}
