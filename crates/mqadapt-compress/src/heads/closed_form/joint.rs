//! Joint refinement: L-BFGS on what all query heads together lose, from the
//! closed-form rows on. The closed form weighs heads by a pooled covariance;
//! here each keeps its own.

use faer::{Mat, MatRef};
use mqadapt_core::Progressing;
use rayon::prelude::*;

use super::group::Stacked;
use super::lbfgs::minimise;
use super::prior::{noise, with_noise};
use super::slow::{right_solve_lower, whiten};
use crate::Error;
use crate::algebra::{cholesky, dot, solve_factored};

/// One query head's share of the objective
/// `tr(M (C_gg - C_g PT (P (C + N) PT)^-1 P C_gT))`, `N` the noise of `C`.
pub(crate) struct JointHead<'a> {
    /// `M`, `[d, d]`: `O_hT O_h` for values, `E[q qT]` for keys.
    pub(crate) metric: &'a Mat<f64>,
    /// `C`, `[stacked, stacked]`, and which of them.
    pub(crate) moments: &'a Stacked<'a>,
    pub(crate) index: usize,
    /// First dim of the head's own member.
    pub(crate) select: usize,
}

/// Relative jitter of `P (C + N) PT`, whose rows are white on average.
const JITTER: f64 = 1e-9;
/// A share of the energy that is not worth a search: it is what rounding may have made.
const NOTHING: f64 = 1e-6;

impl JointHead<'_> {
    /// The energy if nothing is lost.
    fn total(&self, moment: MatRef<'_, f64>) -> f64 {
        let d = self.metric.nrows();
        dot(self.metric.as_ref(), moment.submatrix(self.select, self.select, d, d))
    }

    /// Loss and its gradient by `p`, `[n, stacked]`.
    fn loss(&self, p: MatRef<'_, f64>, moment: MatRef<'_, f64>) -> Result<(f64, Mat<f64>), Error> {
        let d = self.metric.nrows();
        let projected = p * moment; // [n, stacked]
        let noisy = with_noise(p, projected.as_ref(), moment);
        let factor = cholesky((&noisy * p.transpose()).as_ref(), JITTER)?;
        let own = projected.subcols(self.select, d);
        let w = solve_factored(factor.as_ref(), own.to_owned()); // [n, d]
        let weighted = &w * self.metric; // [n, d]
        let loss = self.total(moment) - dot(weighted.as_ref(), own);
        let residual = moment.subrows(self.select, d) - w.transpose() * &noisy; // [d, stacked]
        Ok((loss, faer::Scale(-2.0) * (&weighted * residual)))
    }
}

/// Refines `rows` (`[n, stacked]`) for `iterations`; `mean` is the heads' mean
/// moment, in whose metric, noise included, the problem is well scaled. None where
/// nothing is lost already.
pub(crate) fn joint_rows(
    heads: &[JointHead<'_>],
    mean: &Mat<f64>,
    rows: Mat<f64>,
    iterations: usize,
    progress: &Progressing<'_>,
) -> Result<Option<Mat<f64>>, Error> {
    let totals = heads.iter().map(|head| head.moments.with(head.index, |moment| head.total(moment)));
    let total: f64 = totals.collect::<Result<Vec<_>, _>>()?.iter().sum();
    let (n, stacked) = (rows.nrows(), rows.ncols());
    let noise = noise(mean.as_ref());
    let metric = Mat::from_fn(stacked, stacked, |i, j| mean[(i, j)] + if i == j { noise[i] } else { 0.0 });
    let root = cholesky(metric.as_ref(), 0.0)?;
    let start = whiten(rows, mean.as_ref())?;
    let initial = objective(heads, start.as_ref())?.0;
    if initial.is_nan() || initial <= NOTHING * total {
        return Ok(None);
    }
    let x = &start * &root;
    let mut flat: Vec<f64> = (0..n * stacked).map(|i| x[(i % n, i / n)]).collect();
    let unflatten =
        |flat: &[f64]| right_solve_lower(&MatRef::from_column_major_slice(flat, n, stacked).to_owned(), root.as_ref());
    minimise(&mut flat, iterations, |flat, gradient| {
        let Ok((loss, by_rows)) = objective(heads, unflatten(flat).as_ref()) else { return f64::INFINITY };
        // P = X L^-1, so the gradient by X is (gradient by P) L^-T
        let by_x = crate::algebra::solve_lower(root.as_ref(), by_rows.transpose().to_owned());
        for j in 0..stacked {
            for i in 0..n {
                gradient[j * n + i] = by_x[(j, i)] / initial;
            }
        }
        loss / initial
    });
    progress.tell()?; // an objective that was interrupted ends the search
    Ok(Some(unflatten(&flat)))
}

/// Sum over heads, in their order.
fn objective(heads: &[JointHead<'_>], p: MatRef<'_, f64>) -> Result<(f64, Mat<f64>), Error> {
    let parts: Vec<_> =
        heads.par_iter().map(|head| head.moments.with(head.index, |moment| head.loss(p, moment))?).collect();
    let mut loss = 0.0;
    let mut gradient = Mat::<f64>::zeros(p.nrows(), p.ncols());
    for part in parts {
        let (head_loss, head_gradient) = part?;
        loss += head_loss;
        gradient += head_gradient;
    }
    Ok((loss, gradient))
}
