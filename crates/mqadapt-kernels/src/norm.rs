//! Root-mean-square and layer normalisation.

use crate::{
    Cpu,
    pool::Parts,
    simd::{Simd, kernel},
};

impl Cpu {
    /// `out = x / sqrt(mean(x^2) + eps) * (weight_offset + weight)`, row by row (HF `LlamaRMSNorm`).
    ///
    /// `x` and `out` are `[rows, weight.len()]`; `weight_offset` is 0, or 1 in Gemma. Per-head norms of q and k
    /// pass `rows * heads` rows of `head_dim`.
    ///
    /// # Panics
    /// If a shape does not fit.
    pub fn rms_norm(&self, x: &[f32], weight: &[f32], weight_offset: f32, eps: f32, out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "x and out are equally long");
        let norm = Norm { weight, weight_offset, eps };
        let parts = Parts::new(out);
        self.by_rows(norm.rows(x.len()), weight.len(), |first, rows| {
            let n = weight.len();
            for row in first..first + rows {
                // SAFETY: rows are disjoint and `n` long; a `Cpu` holds only an available `isa`.
                unsafe { rms(self.isa, x[row * n..][..n].as_ptr(), parts.part(row * n, n).as_mut_ptr(), norm) };
            }
        });
    }

    /// [`Cpu::rms_norm`] in place, as for q and k.
    ///
    /// # Panics
    /// If a shape does not fit.
    pub fn rms_norm_inplace(&self, x: &mut [f32], weight: &[f32], weight_offset: f32, eps: f32) {
        let norm = Norm { weight, weight_offset, eps };
        let (rows, n) = (norm.rows(x.len()), weight.len());
        let parts = Parts::new(x);
        self.by_rows(rows, n, |first, rows| {
            for row in first..first + rows {
                // SAFETY: rows are disjoint and `n` long; a `Cpu` holds only an available `isa`.
                unsafe {
                    let x = parts.part(row * n, n).as_mut_ptr();
                    rms(self.isa, x, x, norm);
                }
            }
        });
    }

    /// `residual += delta`, then `out = rms_norm(residual)`, in one pass.
    ///
    /// # Panics
    /// If a shape does not fit.
    pub fn add_rms_norm(
        &self,
        residual: &mut [f32],
        delta: &[f32],
        weight: &[f32],
        weight_offset: f32,
        eps: f32,
        out: &mut [f32],
    ) {
        assert!(residual.len() == delta.len() && residual.len() == out.len(), "all are equally long");
        let norm = Norm { weight, weight_offset, eps };
        let (rows, n) = (norm.rows(delta.len()), weight.len());
        let (residual, out) = (Parts::new(residual), Parts::new(out));
        self.by_rows(rows, n, |first, rows| {
            for row in first..first + rows {
                // SAFETY: rows are disjoint and `n` long; a `Cpu` holds only an available `isa`.
                unsafe {
                    let x = residual.part(row * n, n);
                    x.iter_mut().zip(&delta[row * n..][..n]).for_each(|(x, delta)| *x += delta);
                    rms(self.isa, x.as_ptr(), out.part(row * n, n).as_mut_ptr(), norm);
                }
            }
        });
    }

    /// `out = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias`, row by row (`torch.nn.LayerNorm`).
    ///
    /// # Panics
    /// If a shape does not fit.
    pub fn layer_norm(&self, x: &[f32], weight: &[f32], bias: &[f32], eps: f32, out: &mut [f32]) {
        assert_eq!(x.len(), out.len(), "x and out are equally long");
        assert_eq!(weight.len(), bias.len(), "weight and bias are equally long");
        let norm = Norm { weight, weight_offset: 0.0, eps };
        let parts = Parts::new(out);
        self.by_rows(norm.rows(x.len()), weight.len(), |first, rows| {
            let n = weight.len();
            for row in first..first + rows {
                // SAFETY: rows are disjoint and `n` long; a `Cpu` holds only an available `isa`.
                unsafe {
                    let out = parts.part(row * n, n).as_mut_ptr();
                    layer(self.isa, x[row * n..][..n].as_ptr(), out, norm, bias);
                }
            }
        });
    }
}

#[derive(Clone, Copy)]
struct Norm<'a> {
    weight: &'a [f32],
    weight_offset: f32,
    eps: f32,
}

impl Norm<'_> {
    fn rows(&self, len: usize) -> usize {
        let n = self.weight.len();
        assert!(n > 0 && len.is_multiple_of(n), "{len} values do not make rows of {n}");
        len / n
    }
}

kernel! {
    fn rms = rms_body(x: *const f32, out: *mut f32, norm: Norm<'_>)
}
kernel! {
    fn layer = layer_body(x: *const f32, out: *mut f32, norm: Norm<'_>, bias: &[f32])
}

/// Sum of `f(x)` over a row, four vectors of partial sums at a time.
macro_rules! row_sum {
    ($S:ident, $x:ident, $n:ident, |$v:ident, $sum:ident| $term:expr) => {{
        let mut sums = [$S::zero(); 4];
        let mut i = 0;
        while i < $n {
            for $sum in &mut sums {
                if $n >= i + $S::LANES {
                    let $v = $S::load($x.add(i));
                    *$sum = $term;
                } else if $n > i {
                    let $v = $S::load_n($x.add(i), $n - i);
                    *$sum = $term;
                }
                i += $S::LANES;
            }
        }
        $S::sum($S::add($S::add(sums[0], sums[1]), $S::add(sums[2], sums[3])))
    }};
}

/// # Safety
/// `x` and `out` have the weight's length; they may be the same.
#[inline(always)]
#[allow(clippy::cast_precision_loss)] // a row length
unsafe fn rms_body<S: Simd>(x: *const f32, out: *mut f32, norm: Norm<'_>) {
    let n = norm.weight.len();
    // SAFETY: the caller's promise.
    unsafe {
        let squares = row_sum!(S, x, n, |v, sum| S::fma(v, v, *sum));
        let scale = S::splat(1.0 / (squares / n as f32 + norm.eps).sqrt());
        let offset = S::splat(norm.weight_offset);
        let weight = norm.weight.as_ptr();
        let mut i = 0;
        while i < n {
            let left = n - i;
            let w = S::add(offset, S::load_some(weight.add(i), left));
            S::store_some(out.add(i), left, S::mul(S::mul(S::load_some(x.add(i), left), scale), w));
            i += S::LANES;
        }
    }
}

/// # Safety
/// `x`, `out` and `bias` have the weight's length.
#[inline(always)]
#[allow(clippy::cast_precision_loss)] // a row length
unsafe fn layer_body<S: Simd>(x: *const f32, out: *mut f32, norm: Norm<'_>, bias: &[f32]) {
    let n = norm.weight.len();
    // SAFETY: the caller's promise.
    unsafe {
        let mean = row_sum!(S, x, n, |v, sum| S::add(v, *sum)) / n as f32;
        // Centred first: the mean of squares less the squared mean would cancel.
        let mut i = 0;
        while i < n {
            *out.add(i) = *x.add(i) - mean;
            i += 1;
        }
        let squares = row_sum!(S, out, n, |v, sum| S::fma(v, v, *sum));
        let scale = 1.0 / (squares / n as f32 + norm.eps).sqrt();
        for i in 0..n {
            *out.add(i) = *out.add(i) * scale * norm.weight.get_unchecked(i) + bias.get_unchecked(i);
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::testing::{close, cpus, random, same};

    #[test]
    fn norms_in_every_form() {
        for (rows, n) in [(1, 1), (3, 7), (5, 64), (70, 577)] {
            let x: Vec<f32> = random(1, rows * n).iter().map(|x| x * 9.0 + 2.0).collect();
            let (weight, bias, eps) = (random(2, n), random(3, n), 1e-5f32);
            for cpu in cpus() {
                let what = format!("{cpu:?} [{rows}, {n}]");
                for offset in [0.0f32, 1.0] {
                    let mut out = vec![0.0; rows * n];
                    cpu.rms_norm(&x, &weight, offset, eps, &mut out);
                    let mut expected = Vec::new();
                    for row in x.chunks_exact(n) {
                        let squares = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n as f64;
                        let scale = (squares + f64::from(eps)).sqrt();
                        expected.extend(
                            row.iter().zip(&weight).map(|(&x, &w)| f64::from(x) / scale * f64::from(w + offset)),
                        );
                    }
                    close(&what, &out, &expected, 1e-6);
                    let mut inplace = x.clone();
                    cpu.rms_norm_inplace(&mut inplace, &weight, offset, eps);
                    same(&what, &inplace, &out);
                    let (mut residual, delta) = (vec![1.5; rows * n], random(4, rows * n));
                    let sum: Vec<f32> = delta.iter().map(|delta| 1.5 + delta).collect();
                    cpu.add_rms_norm(&mut residual, &delta, &weight, offset, eps, &mut out);
                    same(&what, &residual, &sum);
                    cpu.rms_norm(&sum, &weight, offset, eps, &mut inplace);
                    same(&what, &inplace, &out);
                }
                let mut out = vec![0.0; rows * n];
                cpu.layer_norm(&x, &weight, &bias, eps, &mut out);
                let mut expected = Vec::new();
                for row in x.chunks_exact(n) {
                    let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / n as f64;
                    let variance = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n as f64;
                    let scale = (variance + f64::from(eps)).sqrt();
                    let value =
                        |j: usize| (f64::from(row[j]) - mean) / scale * f64::from(weight[j]) + f64::from(bias[j]);
                    expected.extend((0..n).map(value));
                }
                close(&what, &out, &expected, 2e-6);
            }
        }
    }
}
