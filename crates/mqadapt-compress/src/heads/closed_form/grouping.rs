//! Which heads share: contiguous groups, or others where the statistics predict
//! less damage.

use std::collections::HashMap;

use mqadapt_core::Progressing;
use rayon::prelude::*;

use super::group::Group;
use super::keys::solve_keys;
use super::predict::predict;
use super::prior::Prior;
use super::values::solve_values;
use crate::Error;
use crate::layer::LayerWeights;
use crate::statistics::LayerStatistics;
use mqadapt_core::AttentionShape;

/// Groups of source heads, one per target head.
pub(crate) type Groups = Vec<Vec<usize>>;

/// `repeat_kv`'s groups.
pub(crate) fn contiguous(geometry: &AttentionShape, target: usize) -> Groups {
    let size = geometry.num_key_value_heads / target;
    (0..target).map(|t| (t * size..(t + 1) * size).collect()).collect()
}

/// Finds better groups by exchanging heads between groups, on the predicted
/// output energy lost by every pair of heads; keeps them only where the whole
/// groups are predicted to lose less than contiguous ones.
pub(crate) fn choose(
    weights: &LayerWeights,
    geometry: &AttentionShape,
    statistics: &LayerStatistics,
    prior: &Prior,
    target: usize,
    cut: usize,
    progress: &Progressing<'_>,
) -> Result<Groups, Error> {
    let start = contiguous(geometry, target);
    let heads = geometry.num_key_value_heads;
    if target == 1 || target == heads || statistics.shape().block_heads != heads {
        return Ok(start);
    }
    let cost = |members: &[usize]| -> Result<f64, Error> {
        let group = Group { geometry, statistics, members, prior: Some(prior), progress };
        let metrics = group.output_metrics(weights);
        let values = solve_values(&group, &metrics, 0)?.plain;
        let keys = if geometry.qk_norm { None } else { Some(solve_keys(&group, cut)?) };
        Ok(predict(&group, &metrics, keys.as_ref().map(|k| (k, cut)), &values)?.output_lost)
    };
    let pairs: Vec<(usize, usize)> = (0..heads).flat_map(|a| (a + 1..heads).map(move |b| (a, b))).collect();
    let costs: HashMap<(usize, usize), f64> =
        pairs.into_par_iter().map(|(a, b)| Ok(((a, b), cost(&[a, b])?))).collect::<Result<_, Error>>()?;
    let mut best = exchange(start.clone(), |a, b| costs[&(a.min(b), a.max(b))]);
    for group in &mut best {
        group.sort_unstable();
    }
    best.sort_unstable();
    let total = |groups: &Groups| -> Result<f64, Error> {
        Ok(groups.par_iter().map(|g| cost(g)).collect::<Result<Vec<_>, _>>()?.iter().sum())
    };
    Ok(if best != start && total(&best)? < total(&start)? { best } else { start })
}

/// Exchanges two heads of different groups as long as that lowers the sum of
/// pair costs within groups; the best exchange first.
fn exchange(mut groups: Groups, pair: impl Fn(usize, usize) -> f64) -> Groups {
    let bond = |groups: &Groups, head: usize, group: usize, without: usize| -> f64 {
        groups[group].iter().filter(|h| **h != head && **h != without).map(|h| pair(head, *h)).sum()
    };
    loop {
        let mut best = (0.0, None);
        for a in 0..groups.len() {
            for b in a + 1..groups.len() {
                for i in 0..groups[a].len() {
                    for j in 0..groups[b].len() {
                        let (x, y) = (groups[a][i], groups[b][j]);
                        let before = bond(&groups, x, a, x) + bond(&groups, y, b, y);
                        let after = bond(&groups, x, b, y) + bond(&groups, y, a, x);
                        if after - before < best.0 - 1e-12 * before.abs() {
                            best = (after - before, Some((a, i, b, j)));
                        }
                    }
                }
            }
        }
        let Some((a, i, b, j)) = best.1 else { return groups };
        let x = groups[a][i];
        groups[a][i] = groups[b][j];
        groups[b][j] = x;
    }
}

#[cfg(test)]
mod tests {
    use super::exchange;

    #[test]
    fn exchange_brings_alike_heads_together() {
        let kind = [0, 1, 2, 0, 1, 2, 1, 0, 2];
        let groups =
            exchange(vec![vec![0, 1, 2], vec![3, 4, 5], vec![6, 7, 8]], |a, b| f64::from(u8::from(kind[a] != kind[b])));
        assert!(groups.iter().all(|g| g.iter().all(|h| kind[*h] == kind[g[0]])), "{groups:?}");
    }
}
