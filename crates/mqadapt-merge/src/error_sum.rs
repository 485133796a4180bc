//! How far merged weights are from the source's.

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
                self.error += f64::from(error);
                self.energy += f64::from(energy);
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

    /// The relative error; 0 for weights that are all zero.
    #[must_use]
    pub fn relative(&self) -> f64 {
        if self.energy > 0.0 { (self.error / self.energy).sqrt() } else { 0.0 }
    }
}
