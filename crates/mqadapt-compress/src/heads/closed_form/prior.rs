//! What is assumed of inputs that the calibration text does not have, and of the sums' own rounding: the closed form
//! divides by moments, and no direction that is without energy by chance may count as one that is free.

use faer::{Mat, MatRef, c64};
use mqadapt_core::Progressing;

use crate::Error;
use crate::attention::project;
use crate::layer::LayerWeights;
use crate::statistics::Moment;
use mqadapt_core::AttentionShape;

/// Energy of white inputs that is added to every moment, as a part of the moment's own.
const UNSEEN: f64 = 1e-3;
/// Energy below which a direction of a moment is rounding, as a part of the energy of its dims: moments are f64 sums of
/// f32 products.
pub(crate) const ROUNDING: f64 = 1e-6;
/// A dim has no less than this part of the mean energy of the dims.
const LEAST: f64 = 1e-6;

/// `W WT` of the stacked K/V heads of a layer: the moments of keys and values of white inputs. Heads that depend on each
/// other by their weights do so here too, so that what merges without loss still does.
pub(crate) struct Prior {
    /// Of each block of K/V heads, `[width, width]` row-major; empty where keys are not mixed.
    key: Vec<Vec<f32>>,
    value: Vec<Vec<f32>>,
    block_heads: usize,
    head_dim: usize,
}

impl Prior {
    /// For statistics that are kept of `block_heads` K/V heads at a time. `k_proj`: what makes keys of inputs, where that is
    /// linear.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub(crate) fn new(
        weights: &LayerWeights,
        k_proj: Option<&[f32]>,
        geometry: &AttentionShape,
        block_heads: usize,
        progress: &Progressing<'_>,
    ) -> Result<Self, Error> {
        let (hidden, head_dim) = (geometry.hidden_size, geometry.head_dim);
        let of = |rows: &[f32]| -> Result<Vec<Vec<f32>>, Error> {
            rows.chunks_exact(block_heads * head_dim * hidden)
                .map(|block| project(block, block, None, hidden, progress))
                .collect()
        };
        let key = k_proj.map_or(Ok(Vec::new()), of)?;
        Ok(Self { key, value: of(&weights.v_proj)?, block_heads, head_dim })
    }

    /// Adds to a stacked moment of some dims of `members` what white inputs would give, [`UNSEEN`] of the moment's energy.
    pub(crate) fn add_to(&self, sum: &mut Mat<f64>, moment: Moment, members: &[usize], dims: &[usize]) {
        let blocks = if moment == Moment::ValueOutput { &self.value } else { &self.key };
        let Some(block) = members.first().and_then(|member| blocks.get(member / self.block_heads)) else { return };
        let (d, width) = (self.head_dim, self.block_heads * self.head_dim);
        let at: Vec<usize> =
            members.iter().flat_map(|g| dims.iter().map(move |i| (g % self.block_heads) * d + i)).collect();
        let energy: f64 = (0..at.len()).map(|i| sum[(i, i)]).sum();
        let white: f64 = at.iter().map(|i| f64::from(block[i * width + i])).sum();
        if !(energy > 0.0 && white > 0.0) {
            return;
        }
        let scale = UNSEEN * energy / white;
        for (j, column) in at.iter().enumerate() {
            for (i, row) in at.iter().enumerate() {
                // one triangle: the product is symmetric but for its rounding
                sum[(i, j)] += scale * f64::from(block[row.max(column) * width + row.min(column)]);
            }
        }
    }

    /// The same for the block of a rotary pair, `E[z zH]`: white inputs rotate into white inputs.
    pub(crate) fn add_to_pair(&self, sum: &mut Mat<c64>, pair: usize, pairs: usize, members: &[usize]) {
        let Some(block) = members.first().and_then(|member| self.key.get(member / self.block_heads)) else { return };
        let (d, width) = (self.head_dim, self.block_heads * self.head_dim);
        let entry = |g: usize, i: usize, h: usize, j: usize| {
            let (row, column) = ((g % self.block_heads) * d + i, (h % self.block_heads) * d + j);
            f64::from(block[row.max(column) * width + row.min(column)])
        };
        let (re, im) = (pair, pair + pairs);
        let white = Mat::from_fn(members.len(), members.len(), |a, b| {
            let (g, h) = (members[a], members[b]);
            c64::new(entry(g, re, h, re) + entry(g, im, h, im), entry(g, im, h, re) - entry(g, re, h, im))
        });
        let trace = |m: &Mat<c64>| -> f64 { (0..m.nrows()).map(|i| m[(i, i)].re).sum() };
        let (energy, of_white) = (trace(sum), trace(&white));
        if energy > 0.0 && of_white > 0.0 {
            *sum += faer::Scale(c64::new(UNSEEN * energy / of_white, 0.0)) * white;
        }
    }
}

/// The diagonal of the noise that rounding is taken for in a moment: [`ROUNDING`] of the energy of each dim.
pub(crate) fn noise(moment: MatRef<'_, f64>) -> Vec<f64> {
    let n = moment.nrows();
    let mean = (0..n).map(|i| moment[(i, i)]).sum::<f64>() / crate::algebra::count(n.max(1));
    (0..n).map(|i| ROUNDING * moment[(i, i)].max(LEAST * mean)).collect()
}

/// `P (M + N)` from `P` and `P M`, `N` the noise of `M`: with `PT` on its right it is the energy that rows have for sure.
pub(crate) fn with_noise(p: MatRef<'_, f64>, projected: MatRef<'_, f64>, moment: MatRef<'_, f64>) -> Mat<f64> {
    let noise = noise(moment);
    Mat::from_fn(p.nrows(), p.ncols(), |i, j| projected[(i, j)] + p[(i, j)] * noise[j])
}
