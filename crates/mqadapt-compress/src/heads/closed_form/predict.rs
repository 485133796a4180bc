//! The damage that the statistics predict for any merge of one group.

use faer::{Mat, MatRef};

use super::group::Group;
use super::keys::KeySolution;
use super::prior::noise;
use super::readout::unexplained;
use super::slow::slow_dims;
use super::values::ValueSolution;
use crate::Error;
use crate::algebra::{count, dot, gather};
use crate::statistics::Moment;

/// Energies of a group, per token: of the logits' variation over keys, and of
/// the heads' outputs after `o_proj`.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Loss {
    pub(crate) logit_lost: f64,
    pub(crate) logit_total: f64,
    pub(crate) output_lost: f64,
    pub(crate) output_total: f64,
}

impl Loss {
    pub(crate) fn add(&mut self, other: &Self) {
        self.logit_lost += other.logit_lost;
        self.logit_total += other.logit_total;
        self.output_lost += other.output_lost;
        self.output_total += other.output_total;
    }
}

/// Loss of a group; `keys` none where the keys cannot be judged (q/k norm). A group with a prior loses what is unseen and
/// what is rounded too.
///
/// Heads count as independent. A logit error of variance `e` costs head `h`
/// about `e tr(Gamma_h Cov_p(v)) / head_dim` of output energy.
///
/// # Errors
/// [`Error::Interrupted`].
pub(crate) fn predict(
    group: &Group<'_>,
    metrics: &[Mat<f64>],
    keys: Option<(&KeySolution, usize)>,
    values: &ValueSolution,
) -> Result<Loss, Error> {
    let d = group.geometry.head_dim;
    let outputs = group.stacked(Moment::ValueOutput, group.all_dims());
    let energy = group.output_energy(metrics);
    let mut loss = Loss::default();
    for (i, head) in group.query_heads().into_iter().enumerate() {
        let at = group.slot(i) * d;
        let unexplained = |moment: MatRef<'_, f64>| {
            let noise = group.prior.map(|_| noise(moment));
            unexplained(values.rows.as_ref(), values.maps[i].as_ref(), moment, at, noise.as_deref())
        };
        let rest = outputs.with(i, unexplained)?;
        loss.output_lost += dot(metrics[i].as_ref(), rest.as_ref()).max(0.0);
        loss.output_total += energy[i];
        if let Some((keys, cut)) = keys {
            let (lost, total) = logits(group, keys, cut, i, head);
            let spread = group.statistics.own(Moment::ValueSecond, head) - group.own_block(Moment::ValueOutput, i);
            let per_logit = dot(metrics[i].as_ref(), spread.as_ref()).max(0.0) / count(d);
            loss.logit_lost += lost;
            loss.logit_total += total;
            loss.output_lost += lost * per_logit;
        }
    }
    Ok(loss)
}

/// Variance of one head's logits over keys: lost by the merge, and in all.
fn logits(group: &Group<'_>, keys: &KeySolution, cut: usize, i: usize, head: usize) -> (f64, f64) {
    let (d, pairs) = (group.geometry.head_dim, group.geometry.rotary_pairs());
    let (slot, map) = (group.slot(i), &keys.maps[i]);
    let query = group.statistics.own(Moment::Query, head);
    let (mut lost, mut total) = (0.0, 0.0);
    for j in 0..cut {
        let energy = (query[(j, j)] + query[(j + pairs, j + pairs)]).max(0.0) / 2.0;
        let block = group.rotated_pair(head, j);
        let c = faer::c64::new(map[(j, j)], map[(j, j + pairs)]);
        let rest: Vec<faer::c64> = (0..group.members.len())
            .map(|g| {
                let u = faer::c64::new(keys.rows[(j, g * d + j)], keys.rows[(j + pairs, g * d + j)]);
                faer::c64::new(f64::from(u8::from(g == slot)), 0.0) - c * u
            })
            .collect();
        let mut variance = 0.0;
        for (a, x) in rest.iter().enumerate() {
            for (b, y) in rest.iter().enumerate() {
                variance += (x * block[(a, b)] * y.conj()).re;
            }
        }
        lost += energy * variance.max(0.0);
        total += energy * block[(slot, slot)].re;
    }
    let dims = slow_dims(cut, pairs, d);
    if !dims.is_empty() {
        let n = dims.len();
        let stacked: Vec<usize> = (0..group.members.len() * n).map(|s| s / n * d + dims[s % n]).collect();
        let moment = group.moment(Moment::KeyCentred, head, &dims);
        let metric = gather(query.as_ref(), &dims, &dims);
        let rows = gather(keys.rows.as_ref(), &dims, &stacked);
        let read_out = gather(map.as_ref(), &dims, &dims).transpose().to_owned();
        let noise = group.prior.map(|_| noise(moment.as_ref()));
        let rest = unexplained(rows.as_ref(), read_out.as_ref(), moment.as_ref(), slot * n, noise.as_deref());
        lost += dot(metric.as_ref(), rest.as_ref()).max(0.0);
        total += dot(metric.as_ref(), moment.submatrix(slot * n, slot * n, n, n));
    }
    let scale = group.geometry.scaling * group.geometry.scaling;
    (lost * scale, total * scale)
}
