//! The attention-output error of a layer and its gradient by the projections, one sequence at a time, in f32.
//!
//! Probabilities are computed block by block and again in the backward pass: memory grows with the tokens, not with
//! their square. Every sum has a fixed order, so results do not depend on the number of threads.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use mqadapt_core::Progressing;
use rayon::prelude::*;

use crate::Error;
use crate::attention::{PART, Probabilities, ROWS, product, project, rotate, rotate_back, view};
use crate::layer::LayerWeights;
use crate::qk_norm::{QkNorm, by_weight, normalise, normalise_back};
use mqadapt_core::AttentionShape;

/// One sequence: what the projections read, and the attention output that is wanted, `[tokens, hidden_size]` each.
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// After the input norm, from position 0.
    pub x: Vec<f32>,
    /// What `o_proj` should give, without its bias.
    pub y: Vec<f32>,
}

impl Target {
    /// The output wanted is that of the original layer: `attention` (`[tokens, features]`) is what its `o_proj`
    /// (`[hidden_size, features]`) read.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub fn of_original(
        x: Vec<f32>,
        attention: &[f32],
        o_proj: &[f32],
        features: usize,
        progress: &Progressing<'_>,
    ) -> Result<Self, Error> {
        Ok(Self { x, y: project(attention, o_proj, None, features, progress)? })
    }
}

/// Squared error over all values, and its gradient, shaped as the weights.
pub(crate) struct Gradient {
    pub(crate) error: f64,
    /// `sum y^2`, to compare the error with.
    pub(crate) energy: f64,
    pub(crate) by: LayerWeights,
}

/// Values of rows side by side: `[tokens, heads * head_dim]`.
struct Projected {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Projected {
    /// Normalises queries and keys, and returns them as they were.
    fn normalise(&mut self, norms: &QkNorm, of_keys: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let before = (self.q.clone(), self.k.clone());
        normalise(&mut self.q, &norms.q_norm, norms.eps);
        normalise(&mut self.k, of_keys, norms.eps);
        before
    }
}

/// What a query head hands back.
struct HeadGradient {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

/// The gradient for one sequence; the layer has `heads` K/V heads, and `norms` where queries and keys are normalised.
pub(crate) fn gradient(
    weights: &LayerWeights,
    geometry: &AttentionShape,
    norms: Option<&QkNorm>,
    heads: usize,
    target: &Target,
    progress: &Progressing<'_>,
) -> Result<Gradient, Error> {
    let (d, hidden, q_heads) = (geometry.head_dim, geometry.hidden_size, geometry.num_attention_heads);
    let (q_width, kv_width) = (q_heads * d, heads * d);
    let (x, tokens) = (target.x.as_slice(), target.x.len() / hidden);
    let mut p = Projected {
        q: project(x, &weights.q_proj, weights.q_proj_bias.as_deref(), hidden, progress)?,
        k: project(x, &weights.k_proj, weights.k_proj_bias.as_deref(), hidden, progress)?,
        v: project(x, &weights.v_proj, weights.v_proj_bias.as_deref(), hidden, progress)?,
    };
    let before = norms.map(|norms| (norms, p.normalise(norms, norms.of_keys(weights))));
    rotate(&mut p.q, q_heads, geometry);
    rotate(&mut p.k, heads, geometry);
    let head = |h: usize| Head { p: &p, geometry, h, g: h / (q_heads / heads), q_width, kv_width, tokens };
    let outputs = (0..q_heads).into_par_iter().map(|h| head(h).forward(progress)).collect::<Result<Vec<_>, Error>>()?;
    let attended = side_by_side(&outputs, d);
    let mut rest = project(&attended, &weights.o_proj, None, q_width, progress)?;
    let (mut error, mut energy) = (0.0, 0.0);
    for (r, y) in rest.iter_mut().zip(&target.y) {
        *r -= y;
        error += f64::from(*r) * f64::from(*r);
        energy += f64::from(*y) * f64::from(*y);
    }
    // the factor 2 of the square is left out: only directions matter
    let o_proj = by_columns(&rest, hidden, &attended, q_width);
    let by_attended = times(&rest, hidden, &weights.o_proj, q_width);
    let backward = |h: usize| head(h).backward(&outputs[h], &by_attended, progress);
    let parts = (0..q_heads).into_par_iter().map(backward).collect::<Result<Vec<_>, Error>>()?;
    let queries: Vec<Vec<f32>> = parts.iter().map(|part| part.q.clone()).collect();
    let mut by_q = side_by_side(&queries, d);
    let shared = |of: fn(&HeadGradient) -> &Vec<f32>| {
        let sums: Vec<Vec<f32>> = parts
            .chunks_exact(q_heads / heads)
            .map(|group| {
                let mut sum = vec![0.0; tokens * d];
                for part in group {
                    sum.iter_mut().zip(of(part)).for_each(|(s, v)| *s += v);
                }
                sum
            })
            .collect();
        side_by_side(&sums, d)
    };
    let (mut by_k, by_v) = (shared(|part| &part.k), shared(|part| &part.v));
    rotate_back(&mut by_q, q_heads, geometry);
    rotate_back(&mut by_k, heads, geometry);
    let mut by_k_norm = None;
    if let Some((norms, (q, k))) = &before {
        by_k_norm = weights.k_norm.as_ref().map(|weight| by_weight(&by_k, k, weight.len(), norms.eps));
        normalise_back(&mut by_q, q, &norms.q_norm, norms.eps);
        normalise_back(&mut by_k, k, norms.of_keys(weights), norms.eps);
    }
    let bias = |there: &Option<Vec<f32>>, by: &[f32], width: usize| there.as_ref().map(|_| column_sums(by, width));
    let by = LayerWeights {
        q_proj: by_columns(&by_q, q_width, x, hidden),
        k_proj: by_columns(&by_k, kv_width, x, hidden),
        v_proj: by_columns(&by_v, kv_width, x, hidden),
        o_proj,
        q_proj_bias: bias(&weights.q_proj_bias, &by_q, q_width),
        k_proj_bias: bias(&weights.k_proj_bias, &by_k, kv_width),
        v_proj_bias: bias(&weights.v_proj_bias, &by_v, kv_width),
        k_norm: by_k_norm,
    };
    Ok(Gradient { error, energy, by })
}

/// One query head of a sequence.
struct Head<'a> {
    p: &'a Projected,
    geometry: &'a AttentionShape,
    h: usize,
    g: usize,
    q_width: usize,
    kv_width: usize,
    tokens: usize,
}

impl<'a> Head<'a> {
    fn probabilities(&self) -> Probabilities<'a> {
        let d = self.geometry.head_dim;
        Probabilities {
            q: view(&self.p.q[self.h * d..], self.tokens, d, self.q_width),
            k: view(&self.p.k[self.g * d..], self.tokens, d, self.kv_width),
            geometry: self.geometry,
        }
    }

    fn values(&self) -> MatRef<'a, f32> {
        let d = self.geometry.head_dim;
        view(&self.p.v[self.g * d..], self.tokens, d, self.kv_width)
    }

    /// `P V`, `[tokens, head_dim]`.
    fn forward(&self, progress: &Progressing<'_>) -> Result<Vec<f32>, Error> {
        let d = self.geometry.head_dim;
        let (probabilities, values) = (self.probabilities(), self.values());
        let mut out = vec![0.0; self.tokens * d];
        let mut p = Vec::new();
        for (i, out) in out.chunks_mut(ROWS * d).enumerate() {
            progress.tell()?;
            let (start, rows) = (i * ROWS, out.len() / d);
            probabilities.block(start, rows, &mut p);
            let keys = start + rows;
            product(out, view(&p, rows, keys, keys), values.subrows(0, keys));
        }
        Ok(out)
    }

    /// Gradients by the rotated queries and keys and by the values, from that by all heads' outputs.
    fn backward(&self, output: &[f32], by_attended: &[f32], progress: &Progressing<'_>) -> Result<HeadGradient, Error> {
        let d = self.geometry.head_dim;
        let scaling = self.geometry.scaling as f32;
        let (probabilities, values) = (self.probabilities(), self.values());
        let by_output = view(&by_attended[self.h * d..], self.tokens, d, self.q_width);
        let mut out = HeadGradient {
            q: vec![0.0; self.tokens * d],
            k: vec![0.0; self.tokens * d],
            v: vec![0.0; self.tokens * d],
        };
        let (mut p, mut by_p, mut slopes) = (Vec::new(), Vec::new(), Vec::new());
        for start in (0..self.tokens).step_by(ROWS) {
            progress.tell()?;
            let rows = ROWS.min(self.tokens - start);
            let keys = start + rows;
            probabilities.block(start, rows, &mut p);
            let upstream = by_output.subrows(start, rows);
            add(&mut out.v[..keys * d], d, view(&p, rows, keys, keys).transpose(), upstream);
            by_p.resize(rows * keys, 0.0);
            product(&mut by_p, upstream, values.subrows(0, keys).transpose());
            for (i, (p, by_p)) in p.chunks_exact(keys).zip(by_p.chunks_exact_mut(keys)).enumerate() {
                // sum_n p_n by_p_n, as the output knows it
                let mean: f32 = (0..d).map(|j| upstream[(i, j)] * output[(start + i) * d + j]).sum();
                for (by, p) in by_p.iter_mut().zip(p) {
                    *by = (*by - mean) * p * scaling;
                }
            }
            if probabilities.slopes(start, rows, &mut slopes) {
                by_p.iter_mut().zip(&slopes).for_each(|(by, slope)| *by *= slope);
            }
            let by_logits = view(&by_p, rows, keys, keys);
            product(&mut out.q[start * d..keys * d], by_logits, probabilities.k.subrows(0, keys));
            add(&mut out.k[..keys * d], d, by_logits.transpose(), probabilities.q.subrows(start, rows));
        }
        Ok(out)
    }
}

/// `out += a b`, `out` row-major with `width` columns.
fn add(out: &mut [f32], width: usize, a: MatRef<'_, f32>, b: MatRef<'_, f32>) {
    let dst = MatMut::from_row_major_slice_mut(out, a.nrows(), width);
    matmul(dst, Accum::Add, a, b, 1.0, Par::Seq);
}

/// `a W`, `a [tokens, inner]`, `weight [inner, width]`.
fn times(a: &[f32], inner: usize, weight: &[f32], width: usize) -> Vec<f32> {
    let mut out = vec![0.0; a.len() / inner * width];
    out.par_chunks_mut(PART * width).zip(a.par_chunks(PART * inner)).for_each(|(out, a)| {
        product(out, view(a, a.len() / inner, inner, inner), view(weight, inner, width, width));
    });
    out
}

/// `aT b`, `a [tokens, rows]`, `b [tokens, width]`: rows of the result divided among threads.
fn by_columns(a: &[f32], rows: usize, b: &[f32], width: usize) -> Vec<f32> {
    let tokens = a.len() / rows;
    let mut out = vec![0.0; rows * width];
    out.par_chunks_mut(PART * width).enumerate().for_each(|(i, out)| {
        let part = view(&a[i * PART..], tokens, out.len() / width, rows);
        product(out, part.transpose(), view(b, tokens, width, width));
    });
    out
}

fn column_sums(a: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0f32; width];
    for row in a.chunks_exact(width) {
        sums.iter_mut().zip(row).for_each(|(s, v)| *s += v);
    }
    sums
}

/// `[tokens, d]` of every head to `[tokens, heads * d]`.
fn side_by_side(heads: &[Vec<f32>], d: usize) -> Vec<f32> {
    let tokens = heads.first().map_or(0, |head| head.len() / d);
    let mut out = Vec::with_capacity(tokens * d * heads.len());
    for t in 0..tokens {
        for head in heads {
            out.extend_from_slice(&head[t * d..(t + 1) * d]);
        }
    }
    out
}
