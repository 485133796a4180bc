//! How far merged weights are from the source's.

use std::ops::RangeInclusive;

/// Sums of squares that f32 holds with all its digits.
const ENERGIES: RangeInclusive<f32> = 1e-30..=1e38;

/// Sums of the relative error of merged weights: `|source - merged repeated back| / |source|` in the Frobenius norm.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ErrorSum {
    error: f64,
    energy: f64,
}

impl ErrorSum {
    /// Adds a piece: the group's heads and the merged values (as written, rounded) that replace them.
    pub fn add(&mut self, heads: &[&[f32]], merged: &[f32]) {
        for head in heads {
            // f32 partial sums over short runs, f64 across them: as fast as memory, and exact enough for three digits
            for (source, merged) in head.chunks(256).zip(merged.chunks(256)) {
                let (mut error, mut energy) = (0.0f32, 0.0f32);
                for (source, merged) in source.iter().zip(merged) {
                    error += (source - merged) * (source - merged);
                    energy += source * source;
                }
                let (error, energy) = if ENERGIES.contains(&energy) && error <= *ENERGIES.end() {
                    (f64::from(error), f64::from(energy))
                } else {
                    in_f64(source, merged)
                };
                self.error += error;
                self.energy += energy;
            }
        }
    }

    /// The two sums, squared error and squared norm of the source, for keeping.
    #[must_use]
    pub fn parts(&self) -> (f64, f64) {
        (self.error, self.energy)
    }

    /// From the two sums.
    #[must_use]
    pub fn from_parts((error, energy): (f64, f64)) -> Self {
        Self { error, energy }
    }

    /// Adds the sums of another piece.
    pub fn merge(&mut self, other: Self) {
        self.error += other.error;
        self.energy += other.energy;
    }

    /// The relative error; 0 for weights that are all zero, NaN where one is not finite.
    #[must_use]
    pub fn relative(&self) -> f64 {
        if self.energy == 0.0 { 0.0 } else { (self.error / self.energy).sqrt() }
    }
}

/// The two sums of a run whose squares are too large or too small for f32.
fn in_f64(source: &[f32], merged: &[f32]) -> (f64, f64) {
    source.iter().zip(merged).fold((0.0, 0.0), |(error, energy), (source, merged)| {
        let (source, merged) = (f64::from(*source), f64::from(*merged));
        (error + (source - merged) * (source - merged), energy + source * source)
    })
}

#[cfg(test)]
mod tests {
    use super::ErrorSum;

    fn relative(source: &[f32], merged: &[f32]) -> f64 {
        let mut sum = ErrorSum::default();
        sum.add(&[source], merged);
        sum.relative()
    }

    #[test]
    fn weights_of_any_size_have_an_error_and_those_that_are_not_finite_none() {
        for size in [1e-38f32, 1e-30, 1.0, 1e25, 1e38] {
            let error = relative(&[size, -size], &[size / 2.0, -size / 2.0]);
            assert!((error - 0.5).abs() < 1e-6, "{size:e}: {error}");
        }
        assert_eq!(relative(&[0.0, 0.0], &[0.0, 0.0]), 0.0);
        for value in [f32::NAN, f32::INFINITY] {
            assert!(relative(&[1.0, value], &[1.0, value]).is_nan(), "{value}");
        }
    }
}
