//! Ridge refit of `o_proj` on the converted stream. Data in: attention outputs
//! before `o_proj` of the converted and the original layer. Data out: a corrected
//! `o_proj` and what it gains.

use faer::linalg::matmul::matmul;
use faer::{Accum, Mat, MatRef, Par, Side};
use mqadapt_core::{DType, Progressing};
use rayon::prelude::*;

use crate::Error;
use crate::algebra::{dot, solve_factored};
use crate::attention::{product, view};
use crate::layer::{check_len, round, round_to};

/// Rows whose products are summed in f32 before they go to f64.
const SUM_ROWS: usize = 512;
/// Columns that are solved at a time.
const COLUMNS: usize = 64;

/// Ridge strength in features scaled to unit energy.
pub const REFIT_LAMBDA: f64 = 0.1;

/// Most energy that a refit's change makes of white inputs, as a part of what `o_proj` does.
const MOST_CHANGE: f64 = 1.0;
/// Strength at which nothing is left of a refit.
const MOST_LAMBDA: f64 = 1e6;

/// Some rows of a refitted `o_proj`.
struct Part {
    rows: Vec<f32>,
    gain: f64,
    /// Energy of their change on white inputs.
    change: f64,
}

/// Sums of one layer's refit, sequence by sequence; sums of two halves add.
pub struct Refit {
    features: usize,
    hidden_size: usize,
    o_proj: Vec<f32>,
    original_o_proj: Vec<f32>,
    /// `W WT` of the values that each K/V head's features are made of.
    values: Vec<Mat<f64>>,
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
            values: Vec::new(),
            gram: Mat::zeros(features, features),
            cross: Mat::zeros(features, hidden_size),
            energy: 0.0,
            error: 0.0,
        })
    }

    /// Bounds the change by the merged layer's `v_proj` (`[num_key_value_heads * head_dim, hidden_size]`): [`Self::solve`].
    ///
    /// # Errors
    /// [`Error::Shape`] where it does not fit.
    pub fn bounded_by(mut self, v_proj: &[f32], head_dim: usize) -> Result<Self, Error> {
        let head = head_dim * self.hidden_size;
        let heads = v_proj.len() / head.max(1);
        check_len("v_proj", v_proj.len(), heads * head)?;
        check_len("features", self.features, self.features / (heads * head_dim).max(1) * heads * head_dim)?;
        let gram = |rows: &[f32]| {
            let rows = Mat::from_fn(head_dim, self.hidden_size, |i, j| f64::from(rows[i * self.hidden_size + j]));
            &rows * rows.transpose()
        };
        self.values = v_proj.chunks_exact(head.max(1)).map(gram).collect();
        Ok(self)
    }

    /// The energy that rows of `o_proj` make of white inputs.
    fn of_white_inputs(&self, rows: &[f64]) -> f64 {
        let Some(head_dim) = self.values.first().map(Mat::nrows) else { return 0.0 };
        let heads = self.features / head_dim;
        let rows = MatRef::from_row_major_slice(rows, rows.len() / self.features, self.features);
        let energy = |head: usize| {
            let own = rows.subcols(head * head_dim, head_dim);
            dot((own * &self.values[head / (heads / self.values.len())]).as_ref(), own)
        };
        (0..heads).map(energy).sum()
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

    /// Relative error of the attention output with the `o_proj` that the refit begins with.
    #[must_use]
    pub fn error(&self) -> f64 {
        self.relative(self.error)
    }

    fn relative(&self, error: f64) -> f64 {
        if self.energy > 0.0 { (error.max(0.0) / self.energy).sqrt() } else { 0.0 }
    }

    /// `O + [(Y - F OT)T F D^-1] (D^-1 FT F D^-1 + lambda I)^-1 D^-1`, `D = diag(FT F)^1/2`, rounded to the `dtype` that it is
    /// stored in: its error is that of the rounded one.
    ///
    /// A text of few distinct tokens says little of others. So `lambda` grows until the change makes of white inputs no more
    /// than `O` does, where there are values to tell ([`Self::bounded_by`]).
    ///
    /// # Errors
    /// [`Error::Option`] for a `lambda` that is not positive; [`Error::Interrupted`].
    pub fn solve(&self, lambda: f64, dtype: DType, progress: &Progressing<'_>) -> Result<Refitted, Error> {
        if !(lambda.is_finite() && lambda > 0.0) {
            return Err(Error::Option(format!("the refit's lambda must be positive, found {lambda}")));
        }
        let mut lambda = lambda;
        loop {
            let (refitted, change) = self.solve_once(lambda, dtype, progress)?;
            if change <= MOST_CHANGE || lambda > MOST_LAMBDA {
                return Ok(refitted);
            }
            lambda *= 4.0;
        }
    }

    /// For one `lambda`; and the energy of the change on white inputs, as a part of that of `O`.
    fn solve_once(&self, lambda: f64, dtype: DType, progress: &Progressing<'_>) -> Result<(Refitted, f64), Error> {
        let scale: Vec<f64> = (0..self.features).map(|i| 1.0 / self.gram[(i, i)].max(1e-30).sqrt()).collect();
        let scaled = Mat::from_fn(self.features, self.features, |i, j| {
            self.gram[(i, j)] * scale[i] * scale[j] + if i == j { lambda } else { 0.0 }
        });
        let factor = scaled.llt(Side::Lower).map_err(|_| Error::NotFinite)?;
        // a few columns at a time: each of them, and what it gains, stands alone
        let columns = |nth: usize| -> Result<Part, Error> {
            progress.tell()?;
            let first = nth * COLUMNS;
            let cross = self.cross.subcols(first, COLUMNS.min(self.hidden_size - first));
            let right = Mat::from_fn(self.features, cross.ncols(), |i, j| cross[(i, j)] * scale[i]);
            let solved = solve_factored(factor.L(), right);
            let start = &self.o_proj[first * self.features..(first + cross.ncols()) * self.features];
            let mut rows = start.to_vec();
            for (at, value) in rows.iter_mut().enumerate() {
                let (i, j) = (at % self.features, at / self.features);
                *value = round(f64::from(*value) + solved[(i, j)] * scale[i]);
            }
            round_to(&mut rows, dtype);
            let step = Mat::from_fn(self.features, cross.ncols(), |i, j| {
                let at = j * self.features + i;
                f64::from(rows[at]) - f64::from(start[at])
            });
            // |Y - F (O + S)T|^2 = |R|^2 - 2 <S, FT R> + <S, FT F S>
            let gain = 2.0 * dot(step.as_ref(), cross) - dot(step.as_ref(), (&self.gram * &step).as_ref());
            let change: Vec<f64> = rows.iter().zip(start).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
            Ok(Part { rows, gain, change: self.of_white_inputs(&change) })
        };
        let parts = (0..self.hidden_size.div_ceil(COLUMNS)).into_par_iter().map(columns);
        let parts = parts.collect::<Result<Vec<_>, Error>>()?;
        let gain: f64 = parts.iter().map(|part| part.gain).sum();
        let change: f64 = parts.iter().map(|part| part.change).sum();
        let start: Vec<f64> = self.o_proj.iter().map(|v| f64::from(*v)).collect();
        let whole = self.of_white_inputs(&start);
        let o_proj = parts.into_iter().flat_map(|part| part.rows).collect();
        let error_after = self.relative(self.error - gain);
        let refitted = Refitted { o_proj, error_before: self.error(), error_after };
        Ok((refitted, if whole > 0.0 { change / whole } else { 0.0 }))
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
    use mqadapt_core::{DType, Progressing};

    use super::Refit;
    use crate::attention::project;
    use crate::heads::closed_form::tests::Noise;

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
        assert!(close(&whole.solve(1e-9, DType::F32, &Progressing::UNWATCHED).unwrap().o_proj, &truth, 1e-5));
        // nearly white features: lambda 1 goes half of the way
        let half: Vec<f32> = truth.iter().zip(&start).map(|(a, b)| f32::midpoint(*a, *b)).collect();
        let refitted = whole.solve(1.0, DType::F32, &Progressing::UNWATCHED).unwrap();
        assert!(close(&refitted.o_proj, &half, 0.15));
        let mut halves = fit(&x[..1]);
        halves.add(&fit(&x[1..])).unwrap();
        assert!(close(
            &halves.solve(0.1, DType::F32, &Progressing::UNWATCHED).unwrap().o_proj,
            &whole.solve(0.1, DType::F32, &Progressing::UNWATCHED).unwrap().o_proj,
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
        assert!(sums.solve(0.0, DType::F32, &Progressing::UNWATCHED).is_err());
        assert!(Refit::new(&[0.0; 29], &[0.0; 30], FEATURES, HIDDEN).is_err());
    }
}
