//! The few decompositions the merges need, over faer, in f64 and sequential:
//! results never depend on the number of threads.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{Mat, MatRef, Par, Side, c64};
use mqadapt_core::Progressing;

use crate::Error;

/// Lower Cholesky factor of `(a + aT) / 2 + jitter * mean diagonal`. The jitter
/// grows until the factor exists: sums of f32 products are only nearly positive.
pub(crate) fn cholesky(a: MatRef<'_, f64>, jitter: f64) -> Result<Mat<f64>, Error> {
    let n = a.nrows();
    let mean = (0..n).map(|i| a[(i, i)]).sum::<f64>() / count(n.max(1));
    if !mean.is_finite() {
        return Err(Error::NotFinite);
    }
    let mut jitter = jitter;
    for _ in 0..8 {
        let shift = jitter * mean.abs() + 1e-30;
        let shifted = Mat::from_fn(n, n, |i, j| f64::midpoint(a[(i, j)], a[(j, i)]) + if i == j { shift } else { 0.0 });
        if let Ok(factor) = shifted.llt(Side::Lower) {
            return Ok(factor.L().to_owned());
        }
        jitter = (jitter * 100.0).max(1e-12);
    }
    Err(Error::NotFinite)
}

/// The `keep` eigenvectors of the largest eigenvalues of a symmetric matrix as columns, largest first.
pub(crate) fn top_eigenvectors(a: Mat<f64>, keep: usize, progress: &Progressing<'_>) -> Result<Mat<f64>, Error> {
    let n = a.nrows();
    let solve = move || {
        let sym = Mat::from_fn(n, n, |i, j| f64::midpoint(a[(i, j)], a[(j, i)]));
        drop(a); // a few of these are the most that a merge holds
        let evd = sym.self_adjoint_eigen(Side::Lower).map_err(|_| Error::NotFinite)?;
        Ok(Mat::from_fn(n, keep, |i, j| evd.U()[(i, n - 1 - j)]))
    };
    if n < DETACHED { solve() } else { interruptible(solve, progress) }
}

/// From this size on a decomposition takes longer than a user waits who has asked to stop.
const DETACHED: usize = 512;
/// How often it is asked whether to go on.
const TICK: Duration = Duration::from_millis(20);

/// Work that cannot be interrupted, on a thread of its own: it is left to itself where nobody waits for it any more.
fn interruptible<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    progress: &Progressing<'_>,
) -> Result<T, Error> {
    let (send, receive) = channel();
    // nobody receives what comes after an interruption
    let thread = std::thread::spawn(move || drop(send.send(work())));
    loop {
        match receive.recv_timeout(TICK) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Timeout) => progress.tell()?,
            Err(RecvTimeoutError::Disconnected) => match thread.join() {
                Err(panic) => std::panic::resume_unwind(panic),
                Ok(()) => return Err(Error::NotFinite),
            },
        }
    }
}

/// The eigenvector of the largest eigenvalue of a Hermitian matrix.
pub(crate) fn top_eigenvector(a: MatRef<'_, c64>) -> Result<Vec<c64>, Error> {
    let n = a.nrows();
    let evd = a.self_adjoint_eigen(Side::Lower).map_err(|_| Error::NotFinite)?;
    Ok((0..n).map(|i| evd.U()[(i, n - 1)]).collect())
}

/// `L^-1 B`
pub(crate) fn solve_lower(l: MatRef<'_, f64>, mut b: Mat<f64>) -> Mat<f64> {
    solve_lower_triangular_in_place(l, b.as_mut(), Par::Seq);
    b
}

/// `L^-T B`
pub(crate) fn solve_lower_transposed(l: MatRef<'_, f64>, mut b: Mat<f64>) -> Mat<f64> {
    solve_upper_triangular_in_place(l.transpose(), b.as_mut(), Par::Seq);
    b
}

/// `(L LT)^-1 B`
pub(crate) fn solve_factored(l: MatRef<'_, f64>, b: Mat<f64>) -> Mat<f64> {
    solve_lower_transposed(l, solve_lower(l, b))
}

/// `trace(A BT)`
pub(crate) fn dot(a: MatRef<'_, f64>, b: MatRef<'_, f64>) -> f64 {
    let mut sum = 0.0;
    for j in 0..a.ncols() {
        for i in 0..a.nrows() {
            sum += a[(i, j)] * b[(i, j)];
        }
    }
    sum
}

/// Rows and columns `rows`, `columns` of `a`.
pub(crate) fn gather(a: MatRef<'_, f64>, rows: &[usize], columns: &[usize]) -> Mat<f64> {
    Mat::from_fn(rows.len(), columns.len(), |i, j| a[(rows[i], columns[j])])
}

/// A count as a float; exact for every size that fits into memory.
pub(crate) fn count(n: usize) -> f64 {
    n as f64
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use mqadapt_core::{Interrupted, Progress, Progressing};

    use super::interruptible;
    use crate::Error;

    /// Wants to stop from the start.
    struct Stopped;

    impl Progress for Stopped {
        fn advance(&self, _phase: &str, _done: u64, _total: u64) -> Result<(), Interrupted> {
            Err(Interrupted)
        }
    }

    #[test]
    fn nobody_waits_for_what_cannot_be_interrupted() {
        assert_eq!(interruptible(|| Ok(7), &Progressing::UNWATCHED), Ok(7));
        let failed: Result<(), _> = interruptible(|| Err(Error::NotFinite), &Progressing::UNWATCHED);
        assert_eq!(failed, Err(Error::NotFinite));
        let stopped = Progressing { progress: &Stopped, ..Progressing::UNWATCHED };
        // work that never ends: the test would not, either
        let forever = || loop {
            std::thread::sleep(Duration::from_secs(1));
        };
        let interrupted: Result<(), _> = interruptible(forever, &stopped);
        assert_eq!(interrupted, Err(Error::Interrupted(Interrupted)));
    }
}
