//! Pruning: the strongest head of a group stays, the others' query heads fall
//! silent. The default of NVIDIA's Puzzle, and the baseline others use.

use crate::Error;
use crate::layer::{LayerWeights, check_target};
use crate::statistics::LayerStatistics;
use mqadapt_core::AttentionShape;

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
    statistics.check(geometry, 1)?;
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
    use super::prune;
    use crate::closed_form::tests::{Noise, geometry, inputs, random_layer, statistics};

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
                    let y =
                        crate::closed_form::outputs(&silent, &geometry, 2, x, &mqadapt_core::Progressing::UNWATCHED)
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
