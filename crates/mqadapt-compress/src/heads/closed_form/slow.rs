//! Slow dims: rotary pairs that hardly turn within the context, and dims that
//! are not rotated. Any linear mix of them is allowed.

use faer::{Mat, MatRef, c64};
use mqadapt_core::Progressing;

use super::group::{Group, Stacked};
use super::pairs::PairMix;
use super::prior::with_noise;
use super::readout::read_outs;
use crate::Error;
use crate::algebra::{cholesky, gather, solve_lower, solve_lower_transposed, top_eigenvectors};
use crate::statistics::Moment;

/// Slow dims of a head for a cut: pairs `cut ..` (re, then im), then unrotated dims.
pub(crate) fn slow_dims(cut: usize, pairs: usize, head_dim: usize) -> Vec<usize> {
    (cut..pairs).chain(pairs + cut..2 * pairs).chain(2 * pairs..head_dim).collect()
}

/// Merged slow rows and the read-out of each query head.
pub(crate) struct SlowKeys {
    /// `[n, members * n]`; row `i` goes into native slot `slow_dims[i]`.
    pub(crate) rows: Mat<f64>,
    /// `[n, n]` per query head.
    pub(crate) read_outs: Vec<Mat<f64>>,
}

/// Moments of a group restricted to the slow dims.
struct SlowMoments<'a> {
    query: Vec<Mat<f64>>,
    key: Stacked<'a>,
    pooled: Mat<f64>,
}

/// Solves the slow dims of a group.
pub(crate) fn solve_slow(group: &Group<'_>, cut: usize) -> Result<SlowKeys, Error> {
    let (d, pairs) = (group.geometry.head_dim, group.geometry.rotary_pairs());
    let dims = slow_dims(cut, pairs, d);
    let n = dims.len();
    let heads = group.query_heads();
    let query: Vec<Mat<f64>> =
        heads.iter().map(|h| gather(group.statistics.own(Moment::Query, *h).as_ref(), &dims, &dims)).collect();
    let key = group.stacked(Moment::KeyCentred, dims);
    let energy: Vec<f64> = query.iter().map(|q| trace(q.as_ref())).collect();
    let pooled = key.pooled(&energy)?;
    let moments = SlowMoments { query, key, pooled };
    let mut rows = principal_rows(group, &moments)?;
    let select: Vec<usize> = (0..heads.len()).map(|i| group.slot(i) * n).collect();
    if cut < pairs {
        rows = align(group, &moments, rows, cut)?;
    }
    let read_outs = read_outs(rows.as_ref(), &moments.key, moments.pooled.as_ref(), &select, n)?;
    Ok(SlowKeys { rows, read_outs })
}

/// Sum of the diagonal.
pub(crate) fn trace(a: MatRef<'_, f64>) -> f64 {
    (0..a.nrows()).map(|i| a[(i, i)]).sum::<f64>().max(0.0)
}

/// `P = UT RT`: top eigenvectors of `RT Cbar R`, `R = blockdiag chol(sum Q_h)`.
fn principal_rows(group: &Group<'_>, moments: &SlowMoments<'_>) -> Result<Mat<f64>, Error> {
    let n = moments.query[0].nrows();
    let blocks = (0..group.members.len()).map(|g| {
        let mut sum = Mat::<f64>::zeros(n, n);
        for (i, q) in moments.query.iter().enumerate() {
            if group.slot(i) == g {
                sum += q;
            }
        }
        sum
    });
    weighted_principal_rows(blocks, moments.pooled.as_ref(), n, 1e-6, group.progress)
}

/// The `keep` leading rows of `UT RT` for `R = blockdiag chol(metrics)`.
pub(crate) fn weighted_principal_rows(
    metrics: impl Iterator<Item = Mat<f64>>,
    pooled: MatRef<'_, f64>,
    keep: usize,
    jitter: f64,
    progress: &Progressing<'_>,
) -> Result<Mat<f64>, Error> {
    let roots = metrics.map(|metric| cholesky(metric.as_ref(), jitter)).collect::<Result<Vec<_>, _>>()?;
    let places: Vec<usize> = roots.iter().scan(0, |at, root| Some(std::mem::replace(at, *at + root.nrows()))).collect();
    let blocks = || roots.iter().zip(&places).map(|(root, at)| (root, *at, root.nrows()));
    // RT Cbar R, block by block: R is mostly zeros
    let mut weighted = Mat::<f64>::zeros(pooled.nrows(), pooled.nrows());
    for (left, i, rows) in blocks() {
        progress.tell()?;
        for (right, j, columns) in blocks() {
            let block = left.transpose() * pooled.submatrix(i, j, rows, columns) * right;
            weighted.submatrix_mut(i, j, rows, columns).copy_from(&block);
        }
    }
    let vectors = top_eigenvectors(weighted, keep, progress)?;
    let mut rows = Mat::<f64>::zeros(keep, pooled.nrows());
    for (root, at, n) in blocks() {
        rows.subcols_mut(at, n).copy_from(&(vectors.subrows(at, n).transpose() * root.transpose()));
    }
    Ok(rows)
}

/// Turns `rows` so that they follow the per-pair (per-dim, where not rotated)
/// solution as closely as an invertible map can: every row then lives at the
/// frequency it came from. `P <- L_t A BT L_k^-1 P`, `A s BT` the SVD of the
/// correlation between the two, `L_t`, `L_k` their Cholesky factors.
fn align(group: &Group<'_>, moments: &SlowMoments<'_>, rows: Mat<f64>, cut: usize) -> Result<Mat<f64>, Error> {
    let target = native_rows(group, moments, group.geometry.rotary_pairs() - cut)?;
    let root = |p: &Mat<f64>| energy_root(p.as_ref(), moments.pooled.as_ref());
    let (target_root, root) = (root(&target)?, root(&rows)?);
    let cross = solve_lower(target_root.as_ref(), &target * &moments.pooled * rows.transpose());
    let cross = solve_lower(root.as_ref(), cross.transpose().to_owned()).transpose().to_owned();
    let svd = cross.svd().map_err(|_| Error::NotFinite)?;
    Ok(&target_root * svd.U() * svd.V().transpose() * solve_lower(root.as_ref(), rows))
}

/// The solution that mixes heads only at the same pair, or the same unrotated dim.
fn native_rows(group: &Group<'_>, moments: &SlowMoments<'_>, slow: usize) -> Result<Mat<f64>, Error> {
    let r = group.geometry.num_key_value_groups();
    let n = moments.query[0].nrows();
    let pairs = group.geometry.rotary_pairs();
    let (heads, dims) = (group.query_heads(), slow_dims(pairs - slow, pairs, group.geometry.head_dim));
    let of = |head: usize, dims: &[usize]| group.moment(Moment::KeyCentred, head, dims);
    let mut target = Mat::<f64>::zeros(n, group.members.len() * n);
    for a in 0..slow {
        let energy: Vec<f64> = moments.query.iter().map(|q| (q[(a, a)] + q[(a + slow, a + slow)]).max(0.0)).collect();
        let blocks: Vec<_> = heads.iter().map(|h| hermitian(&of(*h, &[dims[a], dims[slow + a]]))).collect();
        PairMix::solve(&energy, &blocks, r)?.store(&mut target, a, slow + a, a, slow, n);
    }
    for a in 2 * slow..n {
        let energy: Vec<f64> = moments.query.iter().map(|q| q[(a, a)].max(0.0)).collect();
        let real = |h: &usize| {
            let c = of(*h, &[dims[a]]);
            Mat::from_fn(c.nrows(), c.nrows(), |i, j| c64::new(c[(i, j)], 0.0))
        };
        let blocks: Vec<_> = heads.iter().map(real).collect();
        for (g, u) in PairMix::solve(&energy, &blocks, r)?.u.iter().enumerate() {
            target[(a, g * n + a)] = u.re;
        }
    }
    Ok(target)
}

/// `E[z zH]` of one pair of every member from the real covariance of its two dims, member by member.
fn hermitian(c: &Mat<f64>) -> Mat<c64> {
    Mat::from_fn(c.nrows() / 2, c.nrows() / 2, |i, j| {
        let (i, j) = (2 * i, 2 * j);
        c64::new(c[(i, j)] + c[(i + 1, j + 1)], c[(i + 1, j)] - c[(i, j + 1)])
    })
}

/// Jitter of factors of what has its noise added already.
const WITH_NOISE_JITTER: f64 = 1e-12;

/// `p` with rows made white in `moment` and its noise.
pub(crate) fn whiten(p: Mat<f64>, moment: MatRef<'_, f64>) -> Result<Mat<f64>, Error> {
    if trace(moment) <= 0.0 {
        return Ok(p); // nothing has energy
    }
    let factor = energy_root(p.as_ref(), moment)?;
    Ok(solve_lower(factor.as_ref(), p))
}

/// The Cholesky factor of `P (M + N) PT`.
fn energy_root(p: MatRef<'_, f64>, moment: MatRef<'_, f64>) -> Result<Mat<f64>, Error> {
    let noisy = with_noise(p, (p * moment).as_ref(), moment);
    cholesky((noisy * p.transpose()).as_ref(), WITH_NOISE_JITTER)
}

/// `X L^-1` for lower `L`.
pub(crate) fn right_solve_lower(x: &Mat<f64>, l: MatRef<'_, f64>) -> Mat<f64> {
    solve_lower_transposed(l, x.transpose().to_owned()).transpose().to_owned()
}
