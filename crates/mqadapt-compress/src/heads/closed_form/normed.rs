//! Keys of a layer with q/k norms. In: the closed form of the normalised keys, calibration inputs and the attention outputs
//! wanted of them. Out: mixes of the projections in front of the norms.

use std::collections::BTreeMap;

use mqadapt_core::Progressing;

use super::assembly::Assembly;
use super::keys::KeySolution;
use super::lbfgs::minimise;
use super::measure::Measurement;
use crate::Error;
use crate::algebra::count;
use crate::attention::project;
use crate::layer::{LayerWeights, round};
use crate::qk_norm::{QkNorm, inverse_rms};
use crate::refine::gradient;
use mqadapt_core::AttentionShape;

#[cfg(test)]
mod tests;

/// L-BFGS iterations of the search.
const ITERATIONS: usize = 20;
/// A norm weight is divided by as if it were no smaller than about this part of their root mean square.
const LEAST_WEIGHT: f64 = 1e-3;

/// A layer's norms taken as linear maps, and what its keys are searched with.
pub(crate) struct NormedKeys<'a> {
    measurement: &'a Measurement,
    norms: &'a QkNorm,
    /// Mean `1 / rms` of every K/V head.
    scales: Vec<f64>,
}

impl<'a> NormedKeys<'a> {
    /// None for a layer without norms, or without anything to measure on.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub(crate) fn new(
        weights: &LayerWeights,
        geometry: &AttentionShape,
        measurement: Option<&'a Measurement>,
        progress: &Progressing<'_>,
    ) -> Result<Option<Self>, Error> {
        let Some((measurement, norms)) = measurement.and_then(|m| Some((m, m.norms()?))) else { return Ok(None) };
        let mut scales = vec![0.0; geometry.num_key_value_heads];
        let mut tokens = 0;
        for target in measurement.targets() {
            let k =
                project(&target.x, &weights.k_proj, weights.k_proj_bias.as_deref(), geometry.hidden_size, progress)?;
            for row in k.chunks_exact(scales.len() * geometry.head_dim) {
                let heads = row.chunks_exact(geometry.head_dim);
                scales.iter_mut().zip(heads).for_each(|(scale, head)| *scale += inverse_rms(head, norms.eps));
                tokens += 1;
            }
        }
        let scales = scales.into_iter().map(|scale| scale / count(tokens)).collect();
        Ok(Some(Self { measurement, norms, scales }))
    }

    /// `k_proj` times what the norm multiplies each head by on average.
    pub(crate) fn linear_k_proj(&self, weights: &LayerWeights, hidden_size: usize) -> Vec<f32> {
        let factors = self.scales.iter().flat_map(|s| self.norms.k_norm.iter().map(move |w| round(s * f64::from(*w))));
        let rows = weights.k_proj.chunks_exact(hidden_size).zip(factors);
        rows.flat_map(|(row, factor)| row.iter().map(move |v| v * factor)).collect()
    }

    /// Mixes of normalised heads as mixes of the heads in front of the norms: `D^-1 P D` with the norm's weights `D`, each
    /// head times its mean `1 / rms` in units of the group's.
    pub(crate) fn before_norms(&self, members: &[usize], solved: &KeySolution) -> KeySolution {
        let units = self.units(members);
        let d = self.norms.k_norm.len();
        let (q, k) = (inverses(&self.norms.q_norm), inverses(&self.norms.k_norm));
        let weight = |norm: &[f32], j: usize| f64::from(norm[j % d]);
        let mut out = solved.clone();
        for j in 0..out.rows.ncols() {
            let factor = weight(&self.norms.k_norm, j) * units[j / d];
            (0..d).for_each(|i| out.rows[(i, j)] *= k[i] * factor);
        }
        for map in &mut out.maps {
            for j in 0..d {
                (0..d).for_each(|i| map[(i, j)] *= q[i] * weight(&self.norms.q_norm, j));
            }
        }
        out
    }

    /// Mean `1 / rms` of the members in units of their mean.
    fn units(&self, members: &[usize]) -> Vec<f64> {
        let mean = members.iter().map(|g| self.scales[*g]).sum::<f64>() / count(members.len());
        members.iter().map(|g| if mean > 0.0 { self.scales[*g] / mean } else { 1.0 }).collect()
    }

    /// Lowers the error of the attention output by L-BFGS on the mixes of all groups; `merged` has the layer's values.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub(crate) fn search(
        &self,
        assembly: &Assembly<'_>,
        start: &[KeySolution],
        mut merged: LayerWeights,
        progress: &Progressing<'_>,
    ) -> Result<Vec<KeySolution>, Error> {
        let units: Vec<Vec<f64>> = assembly.groups.iter().map(|members| self.units(members)).collect();
        let weights = self.sequence_weights();
        let mut keys = start.to_vec();
        let mut flat = flatten(&keys, &units, -1);
        minimise(&mut flat, ITERATIONS, |flat, by_flat| {
            unflatten(flat, &units, &mut keys);
            assembly.write_exact_keys(&keys, &mut merged);
            let Ok((error, by_keys)) = self.error(assembly, &merged, &weights, progress) else { return f64::INFINITY };
            by_flat.copy_from_slice(&flatten(&by_keys, &units, 1));
            error
        });
        progress.tell()?; // an error that was interrupted ends the search
        unflatten(&flat, &units, &mut keys);
        Ok(keys)
    }

    /// What a sequence's squared error counts: lengths have equal parts, as where solutions are compared.
    fn sequence_weights(&self) -> Vec<f64> {
        let mut energy: BTreeMap<usize, f64> = BTreeMap::new();
        for target in self.measurement.targets() {
            *energy.entry(target.x.len()).or_default() +=
                target.y.iter().map(|y| f64::from(*y) * f64::from(*y)).sum::<f64>();
        }
        let weight = |length: &usize| energy.get(length).map_or(0.0, |e| if *e > 0.0 { 1.0 / e } else { 0.0 });
        let lengths = count(energy.len());
        self.measurement.targets().iter().map(|target| weight(&target.x.len()) / lengths).collect()
    }

    /// Relative squared error of the attention output, and its gradient by the mixes.
    fn error(
        &self,
        assembly: &Assembly<'_>,
        merged: &LayerWeights,
        weights: &[f64],
        progress: &Progressing<'_>,
    ) -> Result<(f64, Vec<KeySolution>), Error> {
        let heads = assembly.groups.len();
        let mut error = 0.0;
        let mut sum = LayerWeights::default();
        for (target, weight) in self.measurement.targets().iter().zip(weights) {
            let found = gradient(merged, assembly.geometry, Some(self.norms), heads, target, progress)?;
            error += weight * found.error;
            add_scaled(&mut sum, &found.by, round(2.0 * weight));
        }
        Ok((error, assembly.keys_gradient(&sum)))
    }
}

/// Adds a multiple of the queries' and keys' part of a gradient.
fn add_scaled(sum: &mut LayerWeights, by: &LayerWeights, factor: f32) {
    let add = |sum: &mut Vec<f32>, by: &[f32]| {
        sum.resize(by.len(), 0.0);
        sum.iter_mut().zip(by).for_each(|(sum, by)| *sum += factor * by);
    };
    add(&mut sum.q_proj, &by.q_proj);
    add(&mut sum.k_proj, &by.k_proj);
    for (sum, by) in [(&mut sum.q_proj_bias, &by.q_proj_bias), (&mut sum.k_proj_bias, &by.k_proj_bias)] {
        if let Some(by) = by {
            add(sum.get_or_insert_default(), by);
        }
    }
}

/// `1 / w`, bounded.
fn inverses(weights: &[f32]) -> Vec<f64> {
    let energy: f64 = weights.iter().map(|w| f64::from(*w) * f64::from(*w)).sum();
    let least = (LEAST_WEIGHT * LEAST_WEIGHT * energy / count(weights.len())).max(f64::MIN_POSITIVE);
    weights.iter().map(|w| f64::from(*w) / (f64::from(*w) * f64::from(*w) + least)).collect()
}

/// All mixes one after the other, the columns of a member's rows times `unit^power`.
fn flatten(keys: &[KeySolution], units: &[Vec<f64>], power: i32) -> Vec<f64> {
    let mut flat = Vec::new();
    for (solution, units) in keys.iter().zip(units) {
        let d = solution.rows.nrows();
        for j in 0..solution.rows.ncols() {
            flat.extend((0..d).map(|i| solution.rows[(i, j)] * units[j / d].powi(power)));
        }
        for map in &solution.maps {
            (0..d).for_each(|j| flat.extend((0..d).map(|i| map[(i, j)])));
        }
    }
    flat
}

/// The inverse of [`flatten`] with the power -1, into solutions of the same shapes.
fn unflatten(flat: &[f64], units: &[Vec<f64>], keys: &mut [KeySolution]) {
    let mut values = flat.iter().copied();
    for (solution, units) in keys.iter_mut().zip(units) {
        let d = solution.rows.nrows();
        for j in 0..solution.rows.ncols() {
            (0..d).zip(&mut values).for_each(|(i, v)| solution.rows[(i, j)] = v * units[j / d]);
        }
        for map in &mut solution.maps {
            (0..d).for_each(|j| (0..d).zip(&mut values).for_each(|(i, v)| map[(i, j)] = v));
        }
    }
}
