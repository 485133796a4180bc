//! Local gradient steps: the projections of a merged layer moved until its attention output on the converted stream is
//! nearer to the original one. What the closed form takes to second order, the steps see as it is.
//!
//! Data in: a merged layer and sequences of inputs and wanted outputs. Data out: the layer, moved.

mod gradient;
#[cfg(test)]
mod tests;

pub use gradient::Target;
pub(crate) use gradient::gradient;
use mqadapt_core::Progressing;

use crate::Error;
use crate::layer::{LayerWeights, check_len};
use crate::qk_norm::QkNorm;
use mqadapt_core::AttentionShape;

/// Decay of the first and the second moment of Adam.
const BETA: (f32, f32) = (0.9, 0.98);
/// Steps of the linear start of the rate, which then falls as a cosine.
const WARM_UP: usize = 5;

/// How far and how often.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RefineOptions {
    /// Steps of Adam, one sequence each.
    pub steps: usize,
    /// The highest rate, as a part of the root mean square of each projection.
    pub rate: f32,
}

impl Default for RefineOptions {
    fn default() -> Self {
        Self { steps: 96, rate: 0.002 }
    }
}

/// Adam on the projections of a layer with `heads` K/V heads, and `norms` where queries and keys are normalised;
/// `target(step)` gives the sequence of a step.
///
/// # Errors
/// What `target` gives; [`Error::Shape`]; [`Error::Option`] for a layer without its norms; [`Error::NotFinite`];
/// [`Error::Interrupted`].
pub fn refine<E: From<Error>>(
    weights: &LayerWeights,
    geometry: &AttentionShape,
    norms: Option<&QkNorm>,
    heads: usize,
    options: &RefineOptions,
    progress: &Progressing<'_>,
    mut target: impl FnMut(usize) -> Result<Target, E>,
) -> Result<LayerWeights, E> {
    weights.validate(geometry, heads)?;
    if geometry.qk_norm != norms.is_some() {
        return Err(
            Error::Option("gradient steps need the norms of a layer with q/k norm, and no others".into()).into()
        );
    }
    let mut moved = weights.clone();
    let mut adam: Vec<Adam> = moved.tensors().into_iter().map(|w| Adam::new(w, options.rate)).collect();
    for step in 0..options.steps {
        let target = target(step)?;
        let tokens = target.x.len() / geometry.hidden_size;
        check_len("x", target.x.len(), tokens * geometry.hidden_size)?;
        check_len("y", target.y.len(), target.x.len())?;
        let mut found = gradient(&moved, geometry, norms, heads, &target, progress)?;
        if !found.error.is_finite() {
            return Err(Error::NotFinite.into());
        }
        if found.energy <= 0.0 {
            continue;
        }
        let factor = schedule(step, options.steps);
        let scale = (1.0 / found.energy) as f32;
        for ((weights, by), adam) in moved.tensors().into_iter().zip(found.by.tensors()).zip(&mut adam) {
            adam.step(weights, by, scale, factor);
        }
    }
    if moved.tensors().iter().any(|t| t.iter().any(|v| !v.is_finite())) {
        return Err(Error::NotFinite.into());
    }
    Ok(moved)
}

/// Linear at first, then a cosine to nothing.
fn schedule(step: usize, steps: usize) -> f32 {
    let part = |n: usize, of: usize| n as f32 / of as f32;
    part(step + 1, WARM_UP).min(1.0) * 0.5 * (1.0 + (std::f32::consts::PI * part(step, steps)).cos())
}

/// The state of one tensor.
struct Adam {
    rate: f32,
    first: Vec<f32>,
    second: Vec<f32>,
    /// `1 - beta^t`, both.
    seen: (f32, f32),
}

impl Adam {
    fn new(weights: &[f32], rate: f32) -> Self {
        let energy: f64 = weights.iter().map(|w| f64::from(*w) * f64::from(*w)).sum();
        let rms = crate::layer::round((energy / crate::algebra::count(weights.len().max(1))).sqrt());
        Self { rate: rate * rms, first: vec![0.0; weights.len()], second: vec![0.0; weights.len()], seen: (0.0, 0.0) }
    }

    fn step(&mut self, weights: &mut [f32], by: &[f32], scale: f32, factor: f32) {
        self.seen = (BETA.0 * self.seen.0 + (1.0 - BETA.0), BETA.1 * self.seen.1 + (1.0 - BETA.1));
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((weight, by), (first, second)) in weights.iter_mut().zip(by).zip(moments) {
            let by = by * scale;
            *first = BETA.0 * *first + (1.0 - BETA.0) * by;
            *second = BETA.1 * *second + (1.0 - BETA.1) * by * by;
            let direction = (*first / self.seen.0) / ((*second / self.seen.1).sqrt() + 1e-8);
            *weight -= self.rate * factor * direction;
        }
    }
}
