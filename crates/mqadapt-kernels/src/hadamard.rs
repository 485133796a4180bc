//! The Walsh-Hadamard transform of heads: an orthonormal change of basis, its own inverse, that spreads a value over all
//! dimensions. Scores and sums are the same in it, and rows of integers with one scale lose less.

use crate::{
    Cpu,
    pool::Parts,
    simd::{Simd, kernel},
};

impl Cpu {
    /// Transforms every run of `head_dim` values of `x` in place: blocks of powers of two, the largest that fit first
    /// (80 is 64 and 16). A second call gives `x` back, up to rounding.
    ///
    /// # Panics
    /// If `x` is not whole heads.
    pub fn hadamard(&self, x: &mut [f32], head_dim: usize) {
        assert!(head_dim > 0 && x.len().is_multiple_of(head_dim), "x is [heads, {head_dim}]");
        let heads = x.len() / head_dim;
        let parts = Parts::new(x);
        self.by_rows(heads, head_dim, |first, count| {
            for head in first..first + count {
                // SAFETY: heads are disjoint; a `Cpu` holds only an available `isa`.
                unsafe { rotate(self.isa, parts.part(head * head_dim, head_dim)) };
            }
        });
    }
}

kernel! { pub(crate) fn rotate = rotate_body(head: &mut [f32]) }

/// Sums and differences, then one product: the same bits on every instruction set.
///
/// # Safety
/// None beyond that of [`Simd`].
#[inline(always)]
pub(crate) unsafe fn rotate_body<S: Simd>(head: &mut [f32]) {
    let mut rest = head;
    while !rest.is_empty() {
        let len = 1 << rest.len().ilog2();
        let (block, others) = rest.split_at_mut(len);
        let mut half = 1;
        while half < len {
            for pair in block.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        let factor = 1.0 / (len as f32).sqrt();
        for value in &mut *block {
            *value *= factor;
        }
        rest = others;
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{close, cpus, random, same};

    #[test]
    fn an_orthonormal_involution_by_blocks() {
        for dim in [1, 2, 6, 16, 64, 80, 96, 100] {
            let x = random(3, 5 * dim);
            let mut first: Option<Vec<f32>> = None;
            for cpu in cpus() {
                let mut y = x.clone();
                cpu.hadamard(&mut y, dim);
                for (x, y) in x.chunks(dim).zip(y.chunks(dim)) {
                    let energy = |x: &[f32]| x.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
                    assert!((energy(x) - energy(y)).abs() < 1e-5 * energy(x), "{dim}");
                    // the first block's first value is its mean, times the root of its length
                    let len = 1 << dim.ilog2();
                    let mean = x[..len].iter().map(|x| f64::from(*x)).sum::<f64>() / (len as f64).sqrt();
                    assert!((f64::from(y[0]) - mean).abs() < 1e-5, "{dim}");
                }
                same("isa", &y, first.get_or_insert_with(|| y.clone()));
                cpu.hadamard(&mut y, dim);
                close("twice", &y, &x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>(), 1e-6);
            }
        }
    }
}
