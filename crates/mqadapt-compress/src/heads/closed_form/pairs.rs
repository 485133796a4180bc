//! A rotary pair as one complex number per head: the best single complex mix of
//! the heads of a group, and each query head's read-out of it.

use faer::{Mat, c64};

use super::prior::ROUNDING;
use crate::Error;
use crate::algebra::top_eigenvector;

/// `k' = sum_g u_g k_g`.
pub(crate) struct PairMix {
    /// One factor per member.
    pub(crate) u: Vec<c64>,
    /// Each member's read-out of it, by all query heads together.
    pooled: Vec<c64>,
}

impl PairMix {
    /// `energy[i] = E|q_i|^2` and `blocks[i] = E[z zH]` per query head, `r` query
    /// heads per member. `u = w * conj(a)`, `a` the top eigenvector of
    /// `diag(w) Hbar diag(w)`, scaled to the heads' mean energy and turned so
    /// that the read-outs are real on average: equal heads then come back as they were.
    pub(crate) fn solve(energy: &[f64], blocks: &[Mat<c64>], r: usize) -> Result<Self, Error> {
        let members = energy.len() / r;
        let total: f64 = energy.iter().sum::<f64>().max(1e-300);
        let mut mean = Mat::<c64>::zeros(members, members);
        for (e, block) in energy.iter().zip(blocks) {
            for i in 0..members {
                for j in 0..members {
                    mean[(i, j)] += block[(i, j)] * (e / total);
                }
            }
        }
        let w: Vec<f64> = energy.chunks_exact(r).map(|e| e.iter().sum::<f64>().max(1e-20).sqrt()).collect();
        let weighted = Mat::from_fn(members, members, |i, j| mean[(i, j)] * (w[i] * w[j]));
        let a = top_eigenvector(weighted.as_ref())?;
        let u = a.iter().zip(&w).map(|(a, w)| a.conj() * *w).collect();
        let mut mix = Self { u, pooled: vec![c64::new(0.0, 0.0); members] };
        let share: f64 = w.iter().map(|w| w * w).sum();
        let original: f64 = (0..members).map(|g| w[g] * w[g] / share * mean[(g, g)].re).sum();
        let energy_now = mix.energy(&mean);
        let mut turn = c64::new(0.0, 0.0);
        for (i, e) in energy.iter().enumerate() {
            turn += mix.read_out(&mean, i / r) * *e;
        }
        let phase = if turn.norm() > 1e-12 * total { turn / turn.norm() } else { c64::new(1.0, 0.0) };
        let scale = if energy_now > 0.0 && original > 0.0 { (original / energy_now).sqrt() } else { 1.0 };
        mix.u.iter_mut().for_each(|u| *u *= phase * scale);
        mix.pooled = (0..members).map(|g| mix.read_out(&mean, g)).collect();
        Ok(mix)
    }

    /// `E|k'|^2` where `E[z zH] = block`.
    fn energy(&self, block: &Mat<c64>) -> f64 {
        let cross = self.cross(block);
        self.u.iter().zip(&cross).map(|(u, c)| (u * c).re).sum()
    }

    /// `E[k_g conj(k')]` of every member.
    fn cross(&self, block: &Mat<c64>) -> Vec<c64> {
        (0..self.u.len()).map(|i| (0..self.u.len()).map(|j| block[(i, j)] * self.u[j].conj()).sum()).collect()
    }

    /// `c` with `k_g ~ c k'` for member `member`: regressed towards the pooled one where `k'` has no more energy than
    /// the rounding of its terms.
    pub(crate) fn read_out(&self, block: &Mat<c64>, member: usize) -> c64 {
        let energy = self.energy(block).max(0.0);
        let noise: f64 = self.u.iter().enumerate().map(|(g, u)| ROUNDING * u.norm_sqr() * block[(g, g)].re).sum();
        let pooled = self.pooled[member];
        if energy + noise > 0.0 {
            pooled + (self.cross(block)[member] - pooled * energy) / (energy + noise)
        } else {
            pooled
        }
    }

    /// Writes the mix as two real rows: `rows[re]` and `rows[im]` of a matrix
    /// whose columns are the members' dims, `stride` per member, pair at `(at, at + half)`.
    pub(crate) fn store(&self, rows: &mut Mat<f64>, re: usize, im: usize, at: usize, half: usize, stride: usize) {
        for (g, u) in self.u.iter().enumerate() {
            let column = g * stride + at;
            rows[(re, column)] = u.re;
            rows[(re, column + half)] = -u.im;
            rows[(im, column)] = u.im;
            rows[(im, column + half)] = u.re;
        }
    }
}
