//! Values of one group: the rows that keep most of the output, and what `o_proj`
//! makes of them.

use faer::Mat;

use super::group::Group;
use super::joint::{JointHead, joint_rows};
use super::readout::read_outs;
use super::slow::{trace, weighted_principal_rows, whiten};
use crate::Error;
use crate::algebra::count;
use crate::statistics::Moment;

/// The merged values of a group.
#[derive(Clone)]
pub(crate) struct ValueSolution {
    /// `v' = rows * stacked values`, `[head_dim, members * head_dim]`.
    pub(crate) rows: Mat<f64>,
    /// `O'_h = O_h maps[i]`, `[head_dim, head_dim]` per query head.
    pub(crate) maps: Vec<Mat<f64>>,
}

/// A group's values by the closed form, and after the joint refinement.
pub(crate) struct SolvedValues {
    pub(crate) plain: ValueSolution,
    /// None where there was nothing to refine.
    pub(crate) joint: Option<ValueSolution>,
}

/// Solves a group; `metrics[i] = O_hT O_h`, `iterations` of joint refinement.
pub(crate) fn solve_values(group: &Group<'_>, metrics: &[Mat<f64>], iterations: usize) -> Result<SolvedValues, Error> {
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
    let rows = weighted_principal_rows(blocks, pooled.as_ref(), d, 1e-9, group.progress)?;
    let select: Vec<usize> = (0..outputs.len()).map(|i| group.slot(i) * d).collect();
    let mean = outputs.pooled(&vec![1.0; outputs.len()])?;
    let solution = |rows: Mat<f64>| -> Result<ValueSolution, Error> {
        // white rows, as large as the heads that they replace
        let size = (trace(mean.as_ref()) / count(mean.nrows())).sqrt();
        let rows = faer::Scale(if size > 0.0 { size } else { 1.0 }) * whiten(rows, mean.as_ref())?;
        let maps = read_outs(rows.as_ref(), &outputs, pooled.as_ref(), &select, d)?;
        Ok(ValueSolution { rows, maps })
    };
    let mut joint = None;
    if iterations > 0 {
        let heads: Vec<JointHead<'_>> = (0..outputs.len())
            .map(|i| JointHead { metric: &metrics[i], moments: &outputs, index: i, select: select[i] })
            .collect();
        joint = joint_rows(&heads, &mean, rows.clone(), iterations, group.progress)?.map(solution).transpose()?;
    }
    Ok(SolvedValues { plain: solution(rows)?, joint })
}
