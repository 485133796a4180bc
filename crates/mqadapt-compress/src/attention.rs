//! Causal attention of one layer on projected activations, in f32 blocks of
//! rows: what the statistics and the measured error need, and no more.
//! Activations are row-major, `[tokens, heads * head_dim]`.

// what runs in the machine's vectors has to be part of the function that is compiled for them
#![allow(clippy::inline_always)]

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use mqadapt_core::Progressing;
use pulp::{Arch, NullaryFnOnce};
use rayon::prelude::*;

use crate::Error;
use mqadapt_core::AttentionShape;

/// Query rows handled at a time: their probabilities stay in the cache.
pub(crate) const ROWS: usize = 128;

/// A row-major view of `rows` x `columns` inside rows of `stride` values.
pub(crate) fn view(data: &[f32], rows: usize, columns: usize, stride: usize) -> MatRef<'_, f32> {
    if rows == 0 {
        return MatRef::from_row_major_slice(&[], 0, columns);
    }
    MatRef::from_row_major_slice_with_stride(&data[..(rows - 1) * stride + columns], rows, columns, stride)
}

/// `a b` into the row-major `out` (`a.nrows() x b.ncols()`).
pub(crate) fn product(out: &mut [f32], a: MatRef<'_, f32>, b: MatRef<'_, f32>) {
    let dst = MatMut::from_row_major_slice_mut(out, a.nrows(), b.ncols());
    matmul(dst, Accum::Replace, a, b, 1.0, Par::Seq);
}

/// Rows handled by one thread at a time; a part of the result, so that no sum is divided.
pub(crate) const PART: usize = 64;

/// `x WT + b`, `x [tokens, width]`, `weight [rows, width]`, tokens divided among threads.
pub(crate) fn project(
    x: &[f32],
    weight: &[f32],
    bias: Option<&[f32]>,
    width: usize,
    progress: &Progressing<'_>,
) -> Result<Vec<f32>, Error> {
    let (tokens, rows) = (x.len() / width, weight.len() / width);
    let mut out = vec![0.0; tokens * rows];
    out.par_chunks_mut(PART * rows).zip(x.par_chunks(PART * width)).try_for_each(|(out, x)| {
        progress.tell()?;
        product(out, view(x, x.len() / width, width, width), view(weight, rows, width, width).transpose());
        if let Some(bias) = bias {
            out.chunks_exact_mut(rows).for_each(|row| row.iter_mut().zip(bias).for_each(|(a, b)| *a += b));
        }
        Ok::<(), Error>(())
    })?;
    Ok(out)
}

/// Rotates every head of `x` in place; row `t` is position `t`.
pub(crate) fn rotate(x: &mut [f32], heads: usize, geometry: &AttentionShape) {
    turn(x, heads, geometry, 1.0);
}

/// The transpose of [`rotate`]: takes gradients of rotated rows to those of the rows.
pub(crate) fn rotate_back(x: &mut [f32], heads: usize, geometry: &AttentionShape) {
    turn(x, heads, geometry, -1.0);
}

fn turn(x: &mut [f32], heads: usize, geometry: &AttentionShape, sign: f64) {
    let (d, pairs) = (geometry.head_dim, geometry.rotary_pairs());
    if pairs == 0 {
        return;
    }
    let mut table = vec![(0.0f32, 0.0f32); pairs];
    for (t, row) in x.chunks_exact_mut(heads * d).enumerate() {
        for (entry, freq) in table.iter_mut().zip(&geometry.inv_freq) {
            let (sin, cos) = (sign * crate::algebra::count(t) * freq).sin_cos();
            *entry = ((geometry.rotary_factor * cos) as f32, (geometry.rotary_factor * sin) as f32);
        }
        for head in row.chunks_exact_mut(d) {
            let (re, rest) = head.split_at_mut(pairs);
            for ((re, im), (cos, sin)) in re.iter_mut().zip(rest).zip(&table) {
                (*re, *im) = (*re * cos - *im * sin, *im * cos + *re * sin);
            }
        }
    }
}

/// Attention probabilities of one head: rows `start ..` of `q`, all keys up to
/// the last of them.
pub(crate) struct Probabilities<'a> {
    /// Rotated queries of one head, `[tokens, head_dim]`.
    pub(crate) q: MatRef<'a, f32>,
    /// Rotated keys of its K/V head, `[tokens, head_dim]`.
    pub(crate) k: MatRef<'a, f32>,
    pub(crate) geometry: &'a AttentionShape,
}

impl Probabilities<'_> {
    /// Rows `start .. start + rows` into `out`, row-major `[rows, start + rows]`.
    pub(crate) fn block(&self, start: usize, rows: usize, out: &mut Vec<f32>) {
        self.products(start, rows, out);
        let mut scale = self.geometry.scaling as f32;
        if let Some(cap) = self.geometry.attn_logit_softcapping {
            let cap = cap as f32;
            for x in &mut *out {
                *x = cap * (*x * scale / cap).tanh();
            }
            scale = 1.0;
        }
        let window = self.geometry.sliding_window;
        Arch::new().dispatch(Softmax { logits: out, keys: start + rows, start, scale, window });
    }

    /// What a change of a logit before its bound changes behind it, for the same rows: `1 - tanh(logit / cap)^2`. `false`: there
    /// is no bound.
    pub(crate) fn slopes(&self, start: usize, rows: usize, out: &mut Vec<f32>) -> bool {
        let Some(cap) = self.geometry.attn_logit_softcapping else { return false };
        self.products(start, rows, out);
        let factor = (self.geometry.scaling / cap) as f32;
        for x in &mut *out {
            *x = 1.0 - (*x * factor).tanh().powi(2);
        }
        true
    }

    /// Products of queries and keys.
    fn products(&self, start: usize, rows: usize, out: &mut Vec<f32>) {
        let keys = start + rows;
        out.clear();
        out.resize(rows * keys, 0.0);
        product(out, self.q.subrows(start, rows), self.k.subrows(0, keys).transpose());
    }
}

/// Rows of logits to probabilities, in place, in the vectors of the machine: the same bits in all of them, since every
/// sum has an order of its own and no product is fused with a sum.
struct Softmax<'a> {
    /// `[rows, keys]`
    logits: &'a mut [f32],
    keys: usize,
    /// Position of the first row.
    start: usize,
    scale: f32,
    window: Option<usize>,
}

impl NullaryFnOnce for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        for (i, row) in self.logits.chunks_exact_mut(self.keys).enumerate() {
            let end = self.start + i + 1;
            let begin = self.window.map_or(0, |w| end.saturating_sub(w));
            row[..begin].fill(0.0);
            row[end..].fill(0.0);
            let row = &mut row[begin..end];
            let max = greatest(row);
            for x in &mut *row {
                *x = exp_nonpositive((*x - max) * self.scale);
            }
            let inverse = 1.0 / sum(row);
            for x in row {
                *x *= inverse;
            }
        }
    }
}

/// Sums of the columns of probabilities, `[rows, keys]`, in f64.
pub(crate) struct ColumnSums<'a> {
    pub(crate) probabilities: &'a [f32],
    pub(crate) keys: usize,
}

impl NullaryFnOnce for ColumnSums<'_> {
    type Output = Vec<f64>;

    #[inline(always)]
    fn call(self) -> Vec<f64> {
        let mut sums = vec![0.0; self.keys];
        for row in self.probabilities.chunks_exact(self.keys) {
            for (sum, p) in sums.iter_mut().zip(row) {
                *sum += f64::from(*p);
            }
        }
        sums
    }
}

/// The greatest, by eight partial ones, so that it vectorises.
#[inline(always)]
fn greatest(row: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    let chunks = row.chunks_exact(8);
    let tail = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
    for chunk in chunks {
        for (a, b) in lanes.iter_mut().zip(chunk) {
            *a = if *b > *a { *b } else { *a };
        }
    }
    lanes.iter().copied().fold(tail, f32::max)
}

/// Sum with eight fixed partial sums, so that it vectorises.
#[inline(always)]
fn sum(row: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 8];
    let chunks = row.chunks_exact(8);
    let tail: f32 = chunks.remainder().iter().sum();
    for chunk in chunks {
        for (a, b) in lanes.iter_mut().zip(chunk) {
            *a += b;
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// `exp(x)` for `x <= 0`, relative error below 3e-7, branch-free so that it
/// vectorises: `2^n` by exponent bits times a Taylor polynomial on `[-1/2, 1/2]`.
#[inline(always)]
pub(crate) fn exp_nonpositive(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer
    let z = x.max(-87.0) * std::f32::consts::LOG2_E;
    let shifted = z + ROUND;
    let f = z - (shifted - ROUND);
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let mut p = 1.540_353e-4f32;
    for c in [1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 0.240_226_5, std::f32::consts::LN_2, 1.0] {
        p = p * f + c;
    }
    p * f32::from_bits(exponent)
}

/// Attention outputs of all query heads before `o_proj`: `[tokens, num_attention_heads * head_dim]`.
/// `q`, `k` are rotated, `k` and `v` have `num_key_value_heads` heads.
pub(crate) fn attend(
    geometry: &AttentionShape,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    num_key_value_heads: usize,
    progress: &Progressing<'_>,
) -> Result<Vec<f32>, Error> {
    let (d, heads) = (geometry.head_dim, geometry.num_attention_heads);
    let (q_width, kv_width) = (heads * d, num_key_value_heads * d);
    let tokens = q.len() / q_width;
    let per_head = (0..heads)
        .into_par_iter()
        .map(|h| {
            let at = h / (heads / num_key_value_heads) * d;
            let probabilities = Probabilities {
                q: view(&q[h * d..], tokens, d, q_width),
                k: view(&k[at..], tokens, d, kv_width),
                geometry,
            };
            let mut out = vec![0.0; tokens * d];
            out.par_chunks_mut(ROWS * d).enumerate().try_for_each_init(Vec::new, |p, (i, out)| {
                progress.tell()?;
                let (start, rows) = (i * ROWS, out.len() / d);
                probabilities.block(start, rows, p);
                let keys = start + rows;
                product(out, view(p, rows, keys, keys), view(&v[at..], keys, d, kv_width));
                Ok::<(), Error>(())
            })?;
            Ok(out)
        })
        .collect::<Result<Vec<Vec<f32>>, Error>>()?;
    let mut out = vec![0.0; tokens * q_width];
    for (h, head) in per_head.iter().enumerate() {
        for (t, values) in head.chunks_exact(d).enumerate() {
            out[t * q_width + h * d..][..d].copy_from_slice(values);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::exp_nonpositive;

    #[test]
    fn exponentials_are_exact_to_a_few_ulp() {
        for i in 0..20_000u16 {
            let x = -f32::from(i) * 0.004;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp_nonpositive(x)) - exact).abs() / exact;
            // the product with log2(e) is rounded to f32
            assert!(error < 3e-7 + f64::from(-x) * 1.2e-7, "{x}: {error:e}");
        }
        assert!(exp_nonpositive(f32::NEG_INFINITY) < 1e-37);
        assert_eq!(exp_nonpositive(0.0), 1.0);
    }
}
