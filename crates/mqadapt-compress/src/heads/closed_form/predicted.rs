//! What statistics predict for methods that do not use them: heads averaged, taken or pruned.

use faer::Mat;
use mqadapt_core::Progressing;

use super::cut::context_cut;
use super::group::Group;
use super::grouping::contiguous;
use super::keys::KeySolution;
use super::merge::share;
use super::predict::{Loss, predict};
use super::values::ValueSolution;
use crate::layer::{LayerWeights, check_target};
use crate::statistics::{LayerStatistics, Moment};
use crate::{Error, prune};
use mqadapt_core::AttentionShape;

/// A merge of contiguous groups that leaves `q_proj` and `o_proj` alone, but for the columns of pruned heads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FixedMerge {
    /// `mean`: the mean of the group's heads.
    Mean,
    /// `first`: its first head.
    First,
    /// `prune`: its strongest head, the others' query heads silenced ([`prune`]).
    Prune,
}

/// Relative error of the attention output of a layer with `target` K/V heads, as its statistics predict it: the root of
/// the share of its energy that is lost. `context`: tokens for which rotary pairs count as fast or slow.
///
/// Keys of layers with q/k norm are not judged.
///
/// # Errors
/// [`Error::Target`], [`Error::Shape`] or [`Error::StatisticsMismatch`].
pub fn predicted_error(
    weights: &LayerWeights,
    geometry: &AttentionShape,
    target: usize,
    statistics: &LayerStatistics,
    merge: FixedMerge,
    context: usize,
) -> Result<f64, Error> {
    check_target(geometry, target)?;
    weights.validate(geometry, geometry.num_key_value_heads)?;
    if target == geometry.num_key_value_heads {
        return Ok(0.0);
    }
    statistics.check(geometry, geometry.num_key_value_heads / target, &Moment::ALL)?;
    let kept = match merge {
        FixedMerge::Prune => prune(weights, geometry, target, statistics)?.1,
        _ => Vec::new(),
    };
    let (d, cut) = (geometry.head_dim, context_cut(geometry, context));
    let mut loss = Loss::default();
    for members in contiguous(geometry, target) {
        let group = Group { geometry, statistics, members: &members, prior: None, progress: &Progressing::UNWATCHED };
        let weight = |slot: usize| match merge {
            FixedMerge::Mean => 1.0 / crate::algebra::count(members.len()),
            FixedMerge::First => f64::from(u8::from(slot == 0)),
            FixedMerge::Prune => f64::from(u8::from(kept.contains(&members[slot]))),
        };
        let rows = || Mat::from_fn(d, members.len() * d, |i, j| if j % d == i { weight(j / d) } else { 0.0 });
        // a silenced head reads nothing
        let heard = |i: usize| merge != FixedMerge::Prune || weight(group.slot(i)) > 0.0;
        let read = |i: usize| if heard(i) { Mat::identity(d, d) } else { Mat::zeros(d, d) };
        let heads = 0..group.query_heads().len();
        let values = ValueSolution { rows: rows(), maps: heads.clone().map(read).collect() };
        // the keys of a kept head are its own, and a silenced one is lost already
        let judged = !geometry.qk_norm && merge != FixedMerge::Prune;
        let keys = KeySolution { rows: rows(), maps: heads.map(|_| Mat::identity(d, d)).collect(), norm_scale: 1.0 };
        let metrics = group.output_metrics(weights);
        loss.add(&predict(&group, &metrics, judged.then_some((&keys, cut)), &values)?);
    }
    Ok(share(loss.output_lost, loss.output_total))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::heads::closed_form::tests::{Noise, geometry, inputs, random_layer, statistics};
    use crate::heads::closed_form::{ClosedFormOptions, Cut, features, merge};
    use mqadapt_core::family::{LayerTensor, Module};

    use crate::{MergeOptions, merge_tensor, method};

    /// Heads repeated lose nothing by the mean; a pruned layer loses what the silenced heads gave, exactly.
    #[test]
    fn what_is_known_is_predicted() {
        let geometry = geometry(8, 4, 8, 4);
        let mut weights = random_layer(&geometry, true, &mut Noise(41));
        let x = inputs(&geometry, &[300], &mut Noise(42));
        let sums = statistics(&weights, &geometry, &x);
        let predicted = |weights: &LayerWeights, sums: &LayerStatistics, target, merge| {
            predicted_error(weights, &geometry, target, sums, merge, 64).unwrap()
        };
        assert_eq!(predicted(&weights, &sums, 4, FixedMerge::Mean), 0.0);

        let (_, kept) = prune(&weights, &geometry, 2, &sums).unwrap();
        let features = features(&weights, &geometry, 4, &x[0], &Progressing::UNWATCHED).unwrap();
        let (mut lost, mut total) = (0.0f64, 0.0f64);
        for row in features.chunks_exact(64) {
            for head in 0..8 {
                let out = |o: &[f32]| -> f64 {
                    let pairs = o[head * 8..head * 8 + 8].iter().zip(&row[head * 8..]);
                    pairs.map(|(o, f)| f64::from(*o) * f64::from(*f)).sum()
                };
                let energy: f64 = weights.o_proj.chunks_exact(64).map(|o| out(o).powi(2)).sum();
                total += energy;
                lost += if kept.contains(&(head / 2)) { 0.0 } else { energy };
            }
        }
        let found = predicted(&weights, &sums, 2, FixedMerge::Prune);
        assert!((found - (lost / total).sqrt()).abs() < 1e-4, "{found}");

        for tensor in [&mut weights.k_proj, &mut weights.v_proj] {
            let (first, second) = tensor.split_at_mut(8 * 40);
            second[..8 * 40].copy_from_slice(first); // heads 0 and 1 are alike
        }
        for bias in [&mut weights.k_proj_bias, &mut weights.v_proj_bias].into_iter().flatten() {
            let (first, second) = bias.split_at_mut(8);
            second[..8].copy_from_slice(first);
        }
        let sums = statistics(&weights, &geometry, &x);
        let (mean, first) = (FixedMerge::Mean, FixedMerge::First);
        let of_group = |merge| {
            // of the group {0, 1} alone: silence the other query heads
            let mut own = weights.clone();
            own.o_proj.chunks_exact_mut(64).for_each(|row| row[32..].fill(0.0));
            predicted(&own, &sums, 2, merge)
        };
        assert!(of_group(mean) < 1e-3 && of_group(first) < 1e-3);
        assert!(predicted(&weights, &sums, 2, first) > 0.1);
    }

    /// Near the error of the merged layer itself, and above that of the closed form.
    #[test]
    fn predictions_are_near_the_truth() {
        let geometry = geometry(4, 2, 8, 4);
        let weights = random_layer(&geometry, false, &mut Noise(51));
        let x = inputs(&geometry, &[400], &mut Noise(52));
        let sums = statistics(&weights, &geometry, &x);
        let mut merged = LayerWeights { k_proj: vec![0.0; 8 * 40], v_proj: vec![0.0; 8 * 40], ..weights.clone() };
        let mean = method("mean").unwrap().rows().unwrap();
        let options = MergeOptions::default();
        merge_tensor(mean, &options, LayerTensor::weight(0, Module::KProj), &weights.k_proj, 2, &mut merged.k_proj);
        merge_tensor(mean, &options, LayerTensor::weight(0, Module::VProj), &weights.v_proj, 2, &mut merged.v_proj);
        let outputs = |weights: &LayerWeights, heads| {
            crate::heads::closed_form::outputs(weights, &geometry, heads, &x[0], &Progressing::UNWATCHED).unwrap()
        };
        let (y, z) = (outputs(&weights, 2), outputs(&merged, 1));
        let energy = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
        let lost = energy(&mut y.iter().zip(&z).map(|(a, b)| a - b));
        let truth = (lost / energy(&mut y.iter().copied())).sqrt();
        let found = predicted_error(&weights, &geometry, 1, &sums, FixedMerge::Mean, 64).unwrap();
        // heads count as independent, and logit errors to first order only
        assert!(found > 0.6 * truth && found < 1.7 * truth, "{found} {truth}");
        let options = ClosedFormOptions { cut: Cut::Context(vec![64]), ..ClosedFormOptions::default() };
        let (_, report) = merge(&weights, &geometry, 1, &sums, &options, None, &Progressing::UNWATCHED).unwrap();
        assert!(report.output_error < found);
    }
}
