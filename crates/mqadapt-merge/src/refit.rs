//! Ridge refit of `o_proj` on the converted stream. Data in: attention outputs
//! before `o_proj` of the converted and the original layer. Data out: a corrected
//! `o_proj` and what it gains.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par, Side};
use mqadapt_core::Progressing;
use rayon::prelude::*;

use crate::Error;
use crate::algebra::{dot, solve_factored};
use crate::attention::{product, view};
use crate::layer::check_len;

/// Rows whose products are summed in f32 before they go to f64.
const SUM_ROWS: usize = 512;
/// Columns that are solved at a time.
const COLUMNS: usize = 64;

/// Ridge strength in features scaled to unit energy.
pub const REFIT_LAMBDA: f64 = 0.1;

/// Sums of one layer's refit, sequence by sequence; sums of two halves add.
pub struct Refit {
    features: usize,
    hidden_size: usize,
    o_proj: Vec<f32>,
    original_o_proj: Vec<f32>,
    gram: Mat<f64>,
    cross: Mat<f64>,
    /// `|Y|^2` and `|Y - F OT|^2`.
    energy: f64,
    error: f64,
}

/// A refitted `o_proj`, and the relative error of the attention output on the
/// sums' own text.
#[derive(Clone, Debug, PartialEq)]
pub struct Refitted {
    /// `[hidden_size, features]`
    pub o_proj: Vec<f32>,
    /// With the `o_proj` that the refit began with.
    pub error_before: f64,
    /// With the new one.
    pub error_after: f64,
}

impl Refit {
    /// For the merged layer's `o_proj` and the original layer's, both `[hidden_size, features]`,
    /// `features = num_attention_heads * head_dim`.
    ///
    /// # Errors
    /// [`Error::Shape`] where one has another length.
    pub fn new(o_proj: &[f32], original_o_proj: &[f32], features: usize, hidden_size: usize) -> Result<Self, Error> {
        check_len("o_proj", o_proj.len(), features * hidden_size)?;
        check_len("original o_proj", original_o_proj.len(), features * hidden_size)?;
        Ok(Self {
            features,
            hidden_size,
            o_proj: o_proj.to_vec(),
            original_o_proj: original_o_proj.to_vec(),
            gram: Mat::zeros(features, features),
            cross: Mat::zeros(features, hidden_size),
            energy: 0.0,
            error: 0.0,
        })
    }

    /// Adds `FT F` and `FT (Y - F OT)` of one sequence: what `o_proj` reads in the
    /// `converted` layer on the converted stream (`F`) and in the `original` one on
    /// the original stream (`Y` is its product), `[tokens, features]` each.
    ///
    /// # Errors
    /// [`Error::Shape`] where the two have other lengths; [`Error::NotFinite`]; [`Error::Interrupted`], after which the sums
    /// are of no use.
    pub fn add_sequence(
        &mut self,
        converted: &[f32],
        original: &[f32],
        progress: &Progressing<'_>,
    ) -> Result<(), Error> {
        let (f, hidden) = (self.features, self.hidden_size);
        let tokens = converted.len() / f;
        check_len("converted", converted.len(), tokens * f)?;
        check_len("original", original.len(), tokens * f)?;
        if [converted, original].iter().any(|x| x.iter().any(|v| !v.is_finite())) {
            return Err(Error::NotFinite);
        }
        let (o_proj, original_o_proj) = (view(&self.o_proj, hidden, f, f), view(&self.original_o_proj, hidden, f, f));
        let (mut y, mut rest) = (Vec::new(), Vec::new());
        for start in (0..tokens).step_by(SUM_ROWS) {
            progress.tell()?;
            let rows = SUM_ROWS.min(tokens - start);
            let x = view(&converted[start * f..], rows, f, f);
            y.resize(rows * hidden, 0.0);
            rest.resize(rows * hidden, 0.0);
            let of_original = view(&original[start * f..], rows, f, f);
            rayon::join(
                || product(&mut y, of_original, original_o_proj.transpose()),
                || product(&mut rest, x, o_proj.transpose()),
            );
            for (r, y) in rest.iter_mut().zip(&y) {
                *r = y - *r;
                self.energy += f64::from(*y) * f64::from(*y);
                self.error += f64::from(*r) * f64::from(*r);
            }
            progress.tell()?;
            let (gram, cross) = (&mut self.gram, &mut self.cross);
            rayon::join(|| accumulate(gram, x, x), || accumulate(cross, x, view(&rest, rows, hidden, hidden)));
        }
        Ok(())
    }

    /// Adds the sums of other text.
    ///
    /// # Errors
    /// [`Error::StatisticsMismatch`] where they are of another layer.
    pub fn add(&mut self, other: &Self) -> Result<(), Error> {
        if self.o_proj != other.o_proj || self.original_o_proj != other.original_o_proj {
            return Err(Error::StatisticsMismatch("the refit sums are of another o_proj".into()));
        }
        self.gram += &other.gram;
        self.cross += &other.cross;
        self.energy += other.energy;
        self.error += other.error;
        Ok(())
    }

    /// `O + [(Y - F OT)T F D^-1] (D^-1 FT F D^-1 + lambda I)^-1 D^-1`, `D = diag(FT F)^1/2`.
    ///
    /// # Errors
    /// [`Error::Option`] for a `lambda` that is not positive; [`Error::Interrupted`].
    pub fn solve(&self, lambda: f64, progress: &Progressing<'_>) -> Result<Refitted, Error> {
        if !(lambda.is_finite() && lambda > 0.0) {
            return Err(Error::Option(format!("the refit's lambda must be positive, found {lambda}")));
        }
        let scale: Vec<f64> = (0..self.features).map(|i| 1.0 / self.gram[(i, i)].max(1e-30).sqrt()).collect();
        let scaled = Mat::from_fn(self.features, self.features, |i, j| {
            self.gram[(i, j)] * scale[i] * scale[j] + if i == j { lambda } else { 0.0 }
        });
        let factor = scaled.llt(Side::Lower).map_err(|_| Error::NotFinite)?;
        // a few columns at a time: each of them, and what it gains, stands alone
        let columns = |nth: usize| -> Result<(Mat<f64>, f64), Error> {
            progress.tell()?;
            let first = nth * COLUMNS;
            let cross = self.cross.subcols(first, COLUMNS.min(self.hidden_size - first));
            let right = Mat::from_fn(self.features, cross.ncols(), |i, j| cross[(i, j)] * scale[i]);
            let solved = solve_factored(factor.L(), right);
            let step = Mat::from_fn(self.features, cross.ncols(), |i, j| solved[(i, j)] * scale[i]);
            // |Y - F (O + S)T|^2 = |R|^2 - 2 <S, FT R> + <S, FT F S>
            let gain = 2.0 * dot(step.as_ref(), cross) - dot(step.as_ref(), (&self.gram * &step).as_ref());
            Ok((step, gain))
        };
        let parts = (0..self.hidden_size.div_ceil(COLUMNS)).into_par_iter().map(columns);
        let parts = parts.collect::<Result<Vec<_>, Error>>()?;
        let gain: f64 = parts.iter().map(|(_, gain)| gain).sum();
        let mut o_proj = self.o_proj.clone();
        for (row, values) in o_proj.chunks_exact_mut(self.features).enumerate() {
            for (i, value) in values.iter_mut().enumerate() {
                *value = crate::layer::round(f64::from(*value) + parts[row / COLUMNS].0[(i, row % COLUMNS)]);
            }
        }
        let relative = |error: f64| if self.energy > 0.0 { (error.max(0.0) / self.energy).sqrt() } else { 0.0 };
        Ok(Refitted { o_proj, error_before: relative(self.error), error_after: relative(self.error - gain) })
    }
}

/// `sum += aT b`, the product in f32.
fn accumulate(sum: &mut Mat<f64>, a: MatRef<'_, f32>, b: MatRef<'_, f32>) {
    let mut part = Mat::<f32>::zeros(a.ncols(), b.ncols());
    matmul(part.as_mut(), Accum::Replace, a.transpose(), b, 1.0, Par::Seq);
    for j in 0..part.ncols() {
        for i in 0..part.nrows() {
            sum[(i, j)] += f64::from(part[(i, j)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use mqadapt_core::Progressing;

    use super::Refit;
    use crate::attention::project;
    use crate::closed_form::tests::Noise;

    const FEATURES: usize = 6;
    const HIDDEN: usize = 5;

    #[test]
    fn finds_the_projection_that_made_the_output() {
        let mut noise = Noise(21);
        let truth = noise.vec(FEATURES * HIDDEN, 1.0);
        let start: Vec<f32> = truth.iter().map(|v| v + noise.next()).collect();
        let x: Vec<Vec<f32>> = [700, 60].iter().map(|t| noise.vec(t * FEATURES, 3.0)).collect();
        let fit = |sequences: &[Vec<f32>]| {
            let mut sums = Refit::new(&start, &truth, FEATURES, HIDDEN).unwrap();
            for x in sequences {
                sums.add_sequence(x, x, &Progressing::UNWATCHED).unwrap();
            }
            sums
        };
        let whole = fit(&x);
        let close = |a: &[f32], b: &[f32], tolerance: f32| a.iter().zip(b).all(|(a, b)| (a - b).abs() < tolerance);
        assert!(close(&whole.solve(1e-9, &Progressing::UNWATCHED).unwrap().o_proj, &truth, 1e-5));
        // nearly white features: lambda 1 goes half of the way
        let half: Vec<f32> = truth.iter().zip(&start).map(|(a, b)| f32::midpoint(*a, *b)).collect();
        let refitted = whole.solve(1.0, &Progressing::UNWATCHED).unwrap();
        assert!(close(&refitted.o_proj, &half, 0.15));
        let mut halves = fit(&x[..1]);
        halves.add(&fit(&x[1..])).unwrap();
        assert!(close(
            &halves.solve(0.1, &Progressing::UNWATCHED).unwrap().o_proj,
            &whole.solve(0.1, &Progressing::UNWATCHED).unwrap().o_proj,
            1e-6
        ));
        // the errors against their definition
        let relative = |o: &[f32]| {
            let project = |x: &[f32], o: &[f32]| project(x, o, None, FEATURES, &Progressing::UNWATCHED).unwrap();
            let (mut error, mut energy) = (0.0, 0.0);
            for x in &x {
                let (y, found) = (project(x, &truth), project(x, o));
                error += y.iter().zip(&found).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
                energy += y.iter().map(|a| f64::from(*a).powi(2)).sum::<f64>();
            }
            (error / energy).sqrt()
        };
        assert!((refitted.error_before - relative(&start)).abs() < 1e-5);
        assert!((refitted.error_after - relative(&refitted.o_proj)).abs() < 1e-5);
    }

    #[test]
    fn refuses_what_does_not_fit() {
        let mut sums = Refit::new(&[0.0; 30], &[0.0; 30], FEATURES, HIDDEN).unwrap();
        assert!(sums.add_sequence(&[0.0; 12], &[0.0; 6], &Progressing::UNWATCHED).is_err());
        assert!(sums.add_sequence(&[f32::NAN; 6], &[0.0; 6], &Progressing::UNWATCHED).is_err());
        assert!(sums.solve(0.0, &Progressing::UNWATCHED).is_err());
        assert!(Refit::new(&[0.0; 29], &[0.0; 30], FEATURES, HIDDEN).is_err());
    }
}
