//! Keys of a layer with q/k norms. In: the closed form of the normalised keys, calibration inputs and the attention outputs
//! wanted of them. Out: mixes of the projections in front of the norms.

use std::collections::BTreeMap;

use mqadapt_core::Progressing;

use super::assembly::{Assembly, mean_weight};
use super::group::Group;
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
    /// Mean `1 / rms` of what every K/V head is normalised with.
    scales: Vec<f64>,
    /// `1 / rms` of the source's tokens, where all heads are normalised together.
    sources: Option<Sources>,
}

/// What a norm over all heads multiplies each token by: `1 / rms` of its queries and of its keys.
struct Sources {
    queries: Vec<f64>,
    keys: Vec<f64>,
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
        let keys = inverse_rms_of(measurement, norms.eps, norms.k_norm.len(), |x| {
            project(x, &weights.k_proj, weights.k_proj_bias.as_deref(), geometry.hidden_size, progress)
        })?;
        // a norm of each head has one entry a head and token, a norm over all heads one a token
        let (d, kv) = (geometry.head_dim, geometry.num_key_value_heads);
        let together = norms.k_norm.len() / d;
        let mut scales = vec![0.0; kv];
        for row in keys.chunks_exact(kv / together) {
            scales.iter_mut().enumerate().for_each(|(g, scale)| *scale += row[g / together]);
        }
        let tokens = count(keys.len() * together / kv);
        let scales = scales.into_iter().map(|scale| scale / tokens).collect();
        let mut normed = Self { measurement, norms, scales, sources: None };
        if weights.k_norm.is_some() {
            normed.sources = Some(Sources { queries: normed.queries(weights, geometry, progress)?, keys });
        }
        Ok(Some(normed))
    }

    /// `1 / rms` of all queries of every token.
    fn queries(
        &self,
        weights: &LayerWeights,
        geometry: &AttentionShape,
        progress: &Progressing<'_>,
    ) -> Result<Vec<f64>, Error> {
        inverse_rms_of(self.measurement, self.norms.eps, self.norms.q_norm.len(), |x| {
            project(x, &weights.q_proj, weights.q_proj_bias.as_deref(), geometry.hidden_size, progress)
        })
    }

    /// `k_proj` times what the norm multiplies each head by on average.
    pub(crate) fn linear_k_proj(&self, weights: &LayerWeights, hidden_size: usize) -> Vec<f32> {
        let d = weights.k_proj.len() / hidden_size / self.scales.len();
        let weight = self.norms.k_norm.iter().cycle().enumerate();
        let factors = weight.map(|(row, w)| round(self.scales[row / d] * f64::from(*w)));
        let rows = weights.k_proj.chunks_exact(hidden_size).zip(factors);
        rows.flat_map(|(row, factor)| row.iter().map(move |v| v * factor)).collect()
    }

    /// Mixes of normalised heads as mixes of the heads in front of the norms: `D'^-1 P D` with the weights of the norm `D` where
    /// a head is and `D'` where it comes to be, each head times its mean `1 / rms` in units of the group's. `first`: where the
    /// first query head of the group comes to be.
    pub(crate) fn before_norms(&self, group: &Group<'_>, first: usize, solved: &KeySolution) -> KeySolution {
        let units = self.units(group.members);
        let d = group.geometry.head_dim;
        let weight = |norm: &[f32], head: usize, j: usize| f64::from(norm[(head * d + j) % norm.len()]);
        let k = inverses(&mean_weight(&self.norms.k_norm, group.members, d));
        let mut out = solved.clone();
        for j in 0..out.rows.ncols() {
            let factor = weight(&self.norms.k_norm, group.members[j / d], j % d) * units[j / d];
            (0..d).for_each(|i| out.rows[(i, j)] *= k[i] * factor);
        }
        for (i, (map, from)) in out.maps.iter_mut().zip(group.query_heads()).enumerate() {
            let q = inverses(&mean_weight(&self.norms.q_norm, &[first + i], d));
            for j in 0..d {
                (0..d).for_each(|i| map[(i, j)] *= q[i] * weight(&self.norms.q_norm, from, j));
            }
        }
        out
    }

    /// Whether queries and keys are normalised over all heads.
    pub(crate) fn is_over_heads(&self) -> bool {
        self.sources.is_some()
    }

    /// Where all heads are normalised together, what the norm of fewer heads divides by is not what the norm of all divided by:
    /// sets the scale of its weight so that on average queries and keys are as large as they were.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub(crate) fn fit_scale(
        &self,
        assembly: &Assembly<'_>,
        keys: &mut [KeySolution],
        progress: &Progressing<'_>,
    ) -> Result<(), Error> {
        let Some(sources) = &self.sources else { return Ok(()) };
        let mut merged = assembly.empty();
        assembly.write_exact_keys(keys, &mut merged);
        let (geometry, width) = (assembly.geometry, merged.k_norm.as_ref().map_or(1, Vec::len));
        let of_keys = inverse_rms_of(self.measurement, self.norms.eps, width, |x| {
            project(x, &merged.k_proj, merged.k_proj_bias.as_deref(), geometry.hidden_size, progress)
        })?;
        let of_queries = self.queries(&merged, geometry, progress)?;
        let ratio = |source: &[f64], merged: &[f64]| -> f64 {
            source.iter().zip(merged).map(|(source, merged)| source / merged).sum::<f64>() / count(source.len())
        };
        let scale = ratio(&sources.keys, &of_keys) * ratio(&sources.queries, &of_queries);
        for solution in keys {
            solution.norm_scale = scale;
        }
        Ok(())
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
    let optional = [
        (&mut sum.q_proj_bias, &by.q_proj_bias),
        (&mut sum.k_proj_bias, &by.k_proj_bias),
        (&mut sum.k_norm, &by.k_norm),
    ];
    for (sum, by) in optional {
        if let Some(by) = by {
            add(sum.get_or_insert_default(), by);
        }
    }
}

/// `1 / rms` of every run of `width` projected values of the texts that solutions are measured on.
fn inverse_rms_of(
    measurement: &Measurement,
    eps: f64,
    width: usize,
    projected: impl Fn(&[f32]) -> Result<Vec<f32>, Error>,
) -> Result<Vec<f64>, Error> {
    let mut out = Vec::new();
    for target in measurement.targets() {
        out.extend(projected(&target.x)?.chunks_exact(width).map(|run| inverse_rms(run, eps)));
    }
    Ok(out)
}

/// `1 / w`, bounded.
fn inverses(weights: &[f64]) -> Vec<f64> {
    let energy: f64 = weights.iter().map(|w| w * w).sum();
    let least = (LEAST_WEIGHT * LEAST_WEIGHT * energy / count(weights.len())).max(f64::MIN_POSITIVE);
    weights.iter().map(|w| w / (w * w + least)).collect()
}

/// All mixes and scales one after the other, the columns of a member's rows times `unit^power`.
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
        flat.push(solution.norm_scale);
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
        solution.norm_scale = values.next().unwrap_or(solution.norm_scale);
    }
}
