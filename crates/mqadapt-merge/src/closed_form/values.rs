//! Values of one group: the rows that keep most of the output, and what `o_proj`
//! makes of them.

use faer::Mat;

use super::group::Group;
use super::joint::{JointHead, joint_rows};
use super::readout::read_outs;
use super::slow::weighted_principal_rows;
use crate::Error;
use crate::statistics::Moment;

/// The merged values of a group.
pub(crate) struct ValueSolution {
    /// `v' = rows * stacked values`, `[head_dim, members * head_dim]`.
    pub(crate) rows: Mat<f64>,
    /// `O'_h = O_h maps[i]`, `[head_dim, head_dim]` per query head.
    pub(crate) maps: Vec<Mat<f64>>,
}

/// Solves a group; `metrics[i] = O_hT O_h`, `iterations` of joint refinement.
pub(crate) fn solve_values(group: &Group<'_>, metrics: &[Mat<f64>], iterations: usize) -> Result<ValueSolution, Error> {
    let d = group.geometry.head_dim;
    let outputs = group.stacked(Moment::ValueOutput, group.all_dims());
    let pooled = outputs.pooled(&group.output_energy(metrics))?;
    let blocks = (0..group.members.len()).map(|g| {
        let mut sum = Mat::<f64>::zeros(d, d);
        for (i, metric) in metrics.iter().enumerate() {
            if group.slot(i) == g {
                sum += metric;
            }
        }
        sum
    });
    let mut rows = weighted_principal_rows(blocks, pooled.as_ref(), d, 1e-9, group.progress)?;
    let select: Vec<usize> = (0..outputs.len()).map(|i| group.slot(i) * d).collect();
    if iterations > 0 {
        let joint: Vec<JointHead<'_>> = (0..outputs.len())
            .map(|i| JointHead { metric: &metrics[i], moments: &outputs, index: i, select: select[i] })
            .collect();
        rows = joint_rows(&joint, &outputs.pooled(&vec![1.0; outputs.len()])?, rows, iterations, group.progress)?;
    }
    let maps = read_outs(rows.as_ref(), &outputs, pooled.as_ref(), &select, d)?;
    Ok(ValueSolution { rows, maps })
}
