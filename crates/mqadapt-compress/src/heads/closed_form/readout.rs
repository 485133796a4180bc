//! Read-outs: what a query head makes of the merged dims.

use faer::{Mat, MatRef};

use super::group::Stacked;
use super::prior::with_noise;
use crate::Error;
use crate::algebra::{cholesky, solve_factored};

/// Jitter of the read-outs pooled over a group, of the mean diagonal.
const POOLED_JITTER: f64 = 1e-10;
/// Jitter of one head's departure from the pooled read-out.
const HEAD_JITTER: f64 = 1e-6;

/// Least-squares maps from the merged dims `P z` back to the dims `select ..` of
/// each head: `B_h = S_g C_h PT (P C_h PT)^-1`, `[d, P.nrows()]`. Every head is
/// regressed towards the group's pooled read-out, not towards zero, so that
/// heads that are equal merge without loss whatever the jitter.
///
/// Of each query head its moment and `select[i]` (first dim of its own head);
/// `pooled` their weighted mean; `d` dims per head.
pub(crate) fn read_outs(
    p: MatRef<'_, f64>,
    moments: &Stacked<'_>,
    pooled: MatRef<'_, f64>,
    select: &[usize],
    d: usize,
) -> Result<Vec<Mat<f64>>, Error> {
    let projected = p * pooled; // [n, stacked]
    let noisy = with_noise(p, projected.as_ref(), pooled);
    let factor = cholesky((noisy * p.transpose()).as_ref(), POOLED_JITTER)?;
    let all = solve_factored(factor.as_ref(), projected); // pooled read-outs of every member, transposed
    select
        .iter()
        .enumerate()
        .map(|(i, &at)| {
            let base = all.subcols(at, d); // [n, d]
            let (own, noisy) = moments.with(i, |moment| {
                let own = p * moment; // [n, stacked]
                let noisy = with_noise(p, own.as_ref(), moment);
                (own, noisy)
            })?;
            let rest = own.subcols(at, d) - &own * p.transpose() * base;
            let step = solve_factored(cholesky((noisy * p.transpose()).as_ref(), HEAD_JITTER)?.as_ref(), rest);
            Ok((base + step).transpose().to_owned())
        })
        .collect()
}

/// Covariance of `k_g - B P (z + e)`: what a read-out leaves unexplained, for any `B`, with noise `e` of these variances.
pub(crate) fn unexplained(
    p: MatRef<'_, f64>,
    b: MatRef<'_, f64>,
    moment: MatRef<'_, f64>,
    at: usize,
    noise: Option<&[f64]>,
) -> Mat<f64> {
    let (d, n) = (b.nrows(), p.ncols());
    let map = b * p; // [d, stacked]
    let residual = Mat::from_fn(d, n, |i, j| f64::from(u8::from(j == at + i)) - map[(i, j)]);
    let rest = &residual * moment * residual.transpose();
    let Some(noise) = noise else { return rest };
    let noisy = Mat::from_fn(d, n, |i, j| map[(i, j)] * noise[j]);
    rest + noisy * map.transpose()
}
