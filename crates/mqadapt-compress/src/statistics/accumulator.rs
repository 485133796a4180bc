//! One sequence of projected activations in, sums of [`LayerStatistics`] out.
//!
//! Products are f32 per sequence, sums f64. Keys are centred on their sequence
//! mean first: attention-weighted covariances do not change by it, and the
//! difference `E[k kT] - mu muT` loses no digits to a large common key.

use faer::MatRef;
use mqadapt_core::Progressing;
use pulp::Arch;
use rayon::prelude::*;

use super::sums::{HeadMoments, LayerStatistics, Moment, StatisticsShape, triangle};
use crate::Error;
use crate::algebra::count;
use crate::attention::{ColumnSums, Probabilities, ROWS, attend, product, rotate, view};
use crate::layer::check_len;
use mqadapt_core::AttentionShape;

/// Rows whose products are summed in f32 before they go to f64.
const SUM_ROWS: usize = 512;
/// Columns of a triangle that are computed at a time.
const PANEL: usize = 256;

/// Sums the statistics of one layer, sequence by sequence.
pub struct Accumulator {
    geometry: AttentionShape,
    o_proj: Vec<f32>,
    statistics: LayerStatistics,
}

/// Keys, values and rotated keys of one block of K/V heads, side by side:
/// row-major `[tokens, 3 * width]`.
struct StackedHeads {
    stacked: Vec<f32>,
}

impl Accumulator {
    /// `o_proj` (`[hidden_size, num_attention_heads * head_dim]`) of the original
    /// layer, for the heads' contributions; `block_heads` as in [`StatisticsShape`].
    ///
    /// # Errors
    /// [`Error::Geometry`] or [`Error::Shape`] where the arguments do not fit.
    pub fn new(geometry: AttentionShape, o_proj: &[f32], block_heads: Option<usize>) -> Result<Self, Error> {
        let shape = StatisticsShape::new(&geometry, block_heads)?;
        let width = geometry.num_attention_heads * geometry.head_dim;
        check_len("o_proj", o_proj.len(), geometry.hidden_size * width)?;
        Ok(Self { geometry, o_proj: o_proj.to_vec(), statistics: LayerStatistics::zeros(shape) })
    }

    /// The same for some of the moments; the heads' contributions are always summed.
    #[must_use]
    pub fn with_moments(mut self, moments: &'static [Moment]) -> Self {
        self.statistics = LayerStatistics::zeros(self.statistics.shape.with_moments(moments));
        self
    }

    /// Adds one sequence from position 0: `q [tokens, num_attention_heads * head_dim]`,
    /// `k`, `v [tokens, num_key_value_heads * head_dim]`, row-major, as they enter
    /// the rotary embedding (after biases and q/k norms). Returns the attention
    /// outputs before `o_proj`, `[tokens, num_attention_heads * head_dim]`.
    ///
    /// # Errors
    /// [`Error::Shape`] where the three disagree; [`Error::NotFinite`]; [`Error::Interrupted`], after which the sums are of
    /// no use.
    pub fn add_sequence(
        &mut self,
        q: &[f32],
        k: &[f32],
        v: &[f32],
        progress: &Progressing<'_>,
    ) -> Result<Vec<f32>, Error> {
        let geometry = &self.geometry;
        let (d, heads, kv) = (geometry.head_dim, geometry.num_attention_heads, geometry.num_key_value_heads);
        let tokens = q.len() / (heads * d);
        check_len("q", q.len(), tokens * heads * d)?;
        check_len("k", k.len(), tokens * kv * d)?;
        check_len("v", v.len(), tokens * kv * d)?;
        if tokens == 0 {
            return Ok(Vec::new());
        }
        if [q, k, v].iter().any(|x| x.iter().any(|v| !v.is_finite())) {
            return Err(Error::NotFinite);
        }
        let (mut q_rotated, mut k_rotated) = (q.to_vec(), k.to_vec());
        rotate(&mut q_rotated, heads, geometry);
        rotate(&mut k_rotated, kv, geometry);
        if self.statistics.shape.moments.is_empty() {
            let joined = attend(geometry, &q_rotated, &k_rotated, v, kv, progress)?;
            self.add_contributions(&joined, tokens);
            self.statistics.tokens += tokens as u64;
            return Ok(joined);
        }
        let block_heads = self.statistics.shape.block_heads;
        let blocks = stack(k, v, &k_rotated, kv * d, block_heads * d);
        let shape = self.statistics.shape;
        let outputs = self
            .statistics
            .heads
            .par_iter_mut()
            .enumerate()
            .map(|(h, sums)| {
                let g = h / geometry.num_key_value_groups();
                let probabilities = Probabilities {
                    q: view(&q_rotated[h * d..], tokens, d, heads * d),
                    k: view(&k_rotated[g * d..], tokens, d, kv * d),
                    geometry,
                };
                if shape.moments.contains(&Moment::Query) {
                    add_gram(
                        sums.get_mut(Moment::Query),
                        view(&q[h * d..], tokens, d, heads * d),
                        None,
                        1.0,
                        progress,
                    )?;
                }
                add_head(sums, &probabilities, &blocks[g / block_heads], g % block_heads, &shape, progress)
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let mut joined = vec![0.0f32; tokens * heads * d];
        for (h, output) in outputs.iter().enumerate() {
            for (t, values) in output.chunks_exact(d).enumerate() {
                joined[t * heads * d + h * d..][..d].copy_from_slice(values);
            }
        }
        self.add_contributions(&joined, tokens);
        self.statistics.tokens += tokens as u64;
        Ok(joined)
    }

    /// The sums so far.
    #[must_use]
    pub fn finish(self) -> LayerStatistics {
        self.statistics
    }

    fn add_contributions(&mut self, outputs: &[f32], tokens: usize) {
        let (d, heads) = (self.geometry.head_dim, self.geometry.num_attention_heads);
        let (width, hidden) = (self.geometry.num_key_value_groups() * d, self.geometry.hidden_size);
        let o_proj = &self.o_proj;
        self.statistics.contribution.par_iter_mut().enumerate().for_each(|(g, sum)| {
            let weight = view(&o_proj[g * width..], hidden, width, heads * d);
            let mut added = Vec::new();
            for start in (0..tokens).step_by(ROWS) {
                let rows = ROWS.min(tokens - start);
                added.resize(rows * hidden, 0.0);
                let x = view(&outputs[start * heads * d + g * width..], rows, width, heads * d);
                product(&mut added, x, weight.transpose());
                for row in added.chunks_exact(hidden) {
                    *sum += row.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt();
                }
            }
        });
    }
}

/// Centred keys, values and centred rotated keys, block by block.
fn stack(k: &[f32], v: &[f32], k_rotated: &[f32], kv_width: usize, width: usize) -> Vec<StackedHeads> {
    let tokens = k.len() / kv_width;
    let centre = |x: &[f32]| -> Vec<f32> {
        let mut mean = vec![0.0f64; kv_width];
        for row in x.chunks_exact(kv_width) {
            mean.iter_mut().zip(row).for_each(|(m, x)| *m += f64::from(*x));
        }
        mean.iter().map(|m| crate::layer::round(m / count(tokens))).collect()
    };
    let (k_mean, rotated_mean) = (centre(k), centre(k_rotated));
    (0..kv_width / width)
        .map(|b| {
            let at = b * width;
            let mut stacked = Vec::with_capacity(tokens * 3 * width);
            for t in 0..tokens {
                let row = t * kv_width + at..t * kv_width + at + width;
                stacked.extend(k[row.clone()].iter().zip(&k_mean[at..]).map(|(x, m)| x - m));
                stacked.extend_from_slice(&v[row.clone()]);
                stacked.extend(k_rotated[row].iter().zip(&rotated_mean[at..]).map(|(x, m)| x - m));
            }
            StackedHeads { stacked }
        })
        .collect()
}

/// Adds one query head of one sequence; returns its attention output `[tokens, head_dim]`.
fn add_head(
    sums: &mut HeadMoments,
    probabilities: &Probabilities<'_>,
    block: &StackedHeads,
    slot: usize,
    shape: &StatisticsShape,
    progress: &Progressing<'_>,
) -> Result<Vec<f32>, Error> {
    let (d, width, stride) = (shape.head_dim, shape.width(), 3 * shape.width());
    let tokens = block.stacked.len() / stride;
    let own = width + slot * d;
    let wanted = |moment| shape.moments.contains(&moment);
    let pairs_wanted = wanted(Moment::KeyRotated) && shape.rotary_pairs > 0;
    let mut weight = vec![0.0f64; tokens];
    let mut output = Vec::with_capacity(tokens * d);
    // mu: probability-weighted means of the block's columns, [rows, 3 * width], some rows at a time
    let mut mu = vec![0.0f32; SUM_ROWS.min(tokens) * stride];
    for first in (0..tokens).step_by(SUM_ROWS) {
        let rows = SUM_ROWS.min(tokens - first);
        let mu = &mut mu[..rows * stride];
        let columns = mu
            .par_chunks_mut(ROWS * stride)
            .enumerate()
            .map_init(Vec::new, |p, (i, mu)| {
                progress.tell()?;
                let (start, rows) = (first + i * ROWS, mu.len() / stride);
                probabilities.block(start, rows, p);
                let keys = start + rows;
                product(mu, view(p, rows, keys, keys), view(&block.stacked, keys, stride, stride));
                Ok(Arch::new().dispatch(ColumnSums { probabilities: p, keys }))
            })
            .collect::<Result<Vec<_>, Error>>()?;
        for column in &columns {
            weight.iter_mut().zip(column).for_each(|(w, c)| *w += c);
        }
        if wanted(Moment::KeyCentred) {
            add_gram(sums.get_mut(Moment::KeyCentred), view(mu, rows, width, stride), None, -1.0, progress)?;
        }
        if wanted(Moment::ValueOutput) {
            add_gram(sums.get_mut(Moment::ValueOutput), view(&mu[width..], rows, width, stride), None, 1.0, progress)?;
        }
        if pairs_wanted {
            add_pairs(sums.get_mut(Moment::KeyRotated), &mu[2 * width..], stride, None, -1.0, shape);
        }
        mu.chunks_exact(stride).for_each(|row| output.extend_from_slice(&row[own..own + d]));
    }
    drop(mu);
    let root: Vec<f32> = weight.iter().map(|w| crate::layer::round(w.sqrt())).collect();
    if wanted(Moment::KeyCentred) {
        let keys = view(&block.stacked, tokens, width, stride);
        add_gram(sums.get_mut(Moment::KeyCentred), keys, Some(&root), 1.0, progress)?;
    }
    if wanted(Moment::ValueSecond) {
        let values = view(&block.stacked[own..], tokens, d, stride);
        add_gram(sums.get_mut(Moment::ValueSecond), values, Some(&root), 1.0, progress)?;
    }
    if pairs_wanted {
        add_pairs(sums.get_mut(Moment::KeyRotated), &block.stacked[2 * width..], stride, Some(&root), 1.0, shape);
    }
    Ok(output)
}

/// `sum += sign * xT diag(root)^2 x`, the lower triangle.
fn add_gram(
    sum: &mut [f64],
    x: MatRef<'_, f32>,
    root: Option<&[f32]>,
    sign: f64,
    progress: &Progressing<'_>,
) -> Result<(), Error> {
    let n = x.ncols();
    let (mut scaled, mut panel) = (Vec::new(), Vec::new());
    for start in (0..x.nrows()).step_by(SUM_ROWS) {
        let rows = SUM_ROWS.min(x.nrows() - start);
        let part = x.subrows(start, rows);
        let part = if let Some(root) = root {
            scaled.clear();
            for i in 0..rows {
                scaled.extend((0..n).map(|j| part[(i, j)] * root[start + i]));
            }
            view(&scaled, rows, n, n)
        } else {
            part
        };
        for left in (0..n).step_by(PANEL) {
            progress.tell()?;
            let columns = PANEL.min(n - left);
            panel.resize((n - left) * columns, 0.0);
            product(&mut panel, part.subcols(left, n - left).transpose(), part.subcols(left, columns));
            for (i, row) in panel.chunks_exact(columns).enumerate() {
                let at = triangle(left + i, left);
                let row = &row[..columns.min(i + 1)];
                sum[at..at + row.len()].iter_mut().zip(row).for_each(|(sum, v)| *sum += sign * f64::from(*v));
            }
        }
    }
    Ok(())
}

/// `sum[pair, a, b] += sign * sum_t root_t^2 z_a conj(z_b)`, `z` the rotated pairs of each head.
fn add_pairs(sum: &mut [f64], x: &[f32], stride: usize, root: Option<&[f32]>, sign: f64, shape: &StatisticsShape) {
    let (heads, pairs, d) = (shape.block_heads, shape.rotary_pairs, shape.head_dim);
    let tokens = (x.len() - shape.width()) / stride + 1;
    let mut part = vec![0.0f32; heads * heads * 2 * pairs];
    for start in (0..tokens).step_by(ROWS) {
        part.fill(0.0);
        for t in start..(start + ROWS).min(tokens) {
            let row = &x[t * stride..t * stride + shape.width()];
            let weight = root.map_or(1.0, |r| r[t] * r[t]);
            for a in 0..heads {
                let (a_re, a_im) = row[a * d..a * d + 2 * pairs].split_at(pairs);
                for b in 0..=a {
                    let (b_re, b_im) = row[b * d..b * d + 2 * pairs].split_at(pairs);
                    let (re, im) = part[(a * heads + b) * 2 * pairs..][..2 * pairs].split_at_mut(pairs);
                    for j in 0..pairs {
                        re[j] += weight * (a_re[j] * b_re[j] + a_im[j] * b_im[j]);
                        im[j] += weight * (a_im[j] * b_re[j] - a_re[j] * b_im[j]);
                    }
                }
            }
        }
        for a in 0..heads {
            for b in 0..=a {
                let (re, im) = part[(a * heads + b) * 2 * pairs..][..2 * pairs].split_at(pairs);
                for j in 0..pairs {
                    let (re, im) = (sign * f64::from(re[j]), sign * f64::from(im[j]));
                    let at = 2 * ((j * heads + a) * heads + b);
                    sum[at] += re;
                    sum[at + 1] += im;
                    if a != b {
                        let at = 2 * ((j * heads + b) * heads + a);
                        sum[at] += re;
                        sum[at + 1] -= im;
                    }
                }
            }
        }
    }
}
