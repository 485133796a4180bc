//! A whole layer: groups, values, the cut, keys, and what it all costs.

use faer::{Mat, MatRef};
use mqadapt_core::Progressing;

use super::cut::{Cut, candidates, context_cut};
use super::group::Group;
use super::grouping::{Groups, choose, contiguous};
use super::keys::{KeySolution, solve_keys};
use super::measure::Measurement;
use super::predict::{Loss, predict};
use super::values::{ValueSolution, solve_values};
use crate::Error;
use crate::layer::{LayerGeometry, LayerWeights, affine_head, output_head, store_affine_head, store_output_head};
use crate::statistics::LayerStatistics;

/// Choices of [`merge`].
#[derive(Clone, Debug, PartialEq)]
pub struct ClosedFormOptions {
    /// Where the rotary pairs are divided.
    pub cut: Cut,
    /// L-BFGS iterations of the joint values; 0 leaves the closed-form rows.
    pub joint_iterations: usize,
    /// May put heads that are not neighbours into one group.
    pub regroup: bool,
}

impl Default for ClosedFormOptions {
    fn default() -> Self {
        Self { cut: Cut::Context(vec![2048]), joint_iterations: 25, regroup: true }
    }
}

/// Something the closed form cannot do for this layer and did another way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fallback {
    /// Keys are the mean of their group: q/k norms do not commute with mixing heads.
    MeanKeys,
}

impl Fallback {
    /// One line for reports and manifests.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::MeanKeys => "keys mean-pooled: q/k norm does not commute with mixing heads",
        }
    }
}

/// What was done to a layer, and the damage its statistics predict.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct LayerReport {
    /// K/V heads of the merged layer.
    pub num_key_value_heads: usize,
    /// Fast rotary pairs; none where keys were not solved.
    pub cut: Option<usize>,
    /// Predicted relative error of the attention logits (root of the share of
    /// their variance over keys that is lost); none where keys were not solved.
    pub logit_error: Option<f64>,
    /// Predicted relative error of the attention output.
    pub output_error: f64,
    /// Measured relative attention-output error of every cut tried.
    pub measured: Vec<(usize, f64)>,
    /// Source K/V heads in the order of the groups, where not contiguous.
    pub regrouped: Option<Vec<usize>>,
    /// What was done another way.
    pub fallbacks: Vec<Fallback>,
}

/// Merges the `num_key_value_heads` heads of a layer into `target`.
///
/// `statistics` of the original layer; [`Cut::Measured`] needs a `measurement`
/// of the same layer. A target equal to the source returns the weights as they are.
///
/// # Errors
/// [`Error::Target`], [`Error::Shape`], [`Error::StatisticsMismatch`],
/// [`Error::Option`] for a measured cut without a measurement, [`Error::NotFinite`], [`Error::Interrupted`].
pub fn merge(
    weights: &LayerWeights,
    geometry: &LayerGeometry,
    target: usize,
    statistics: &LayerStatistics,
    options: &ClosedFormOptions,
    measurement: Option<&Measurement>,
    progress: &Progressing<'_>,
) -> Result<(LayerWeights, LayerReport), Error> {
    geometry.check_target(target)?;
    weights.validate(geometry, geometry.num_key_value_heads)?;
    let mut report = LayerReport { num_key_value_heads: target, ..LayerReport::default() };
    if target == geometry.num_key_value_heads {
        report.logit_error = Some(0.0);
        return Ok((weights.clone(), report));
    }
    statistics.check(geometry, geometry.num_key_value_heads / target)?;
    let (cuts, first_cut) = cuts(geometry, options, measurement)?;
    let groups = if options.regroup {
        choose(weights, geometry, statistics, target, first_cut, progress)?
    } else {
        contiguous(geometry, target)
    };
    let solver = Solver { weights, geometry, statistics, groups: &groups, options, progress };
    let values = solver.values()?;
    let mut merged = solver.with_values(&values);
    if geometry.qk_norm {
        report.fallbacks.push(Fallback::MeanKeys);
        solver.write_keys(&solver.mean_keys(), &mut merged);
        let loss = solver.loss(None, &values)?;
        report.output_error = share(loss.output_lost, loss.output_total);
    } else {
        let (cut, keys) = solver.best_keys(&cuts, measurement, &mut merged, &mut report)?;
        let loss = solver.loss(Some((&keys, cut)), &values)?;
        report.cut = Some(cut);
        report.logit_error = Some(share(loss.logit_lost, loss.logit_total));
        report.output_error = share(loss.output_lost, loss.output_total);
    }
    if groups != contiguous(geometry, target) {
        report.regrouped = Some(groups.concat());
    }
    let tensors = [&merged.q_proj, &merged.k_proj, &merged.v_proj, &merged.o_proj];
    if tensors.iter().any(|t| t.iter().any(|v| !v.is_finite())) {
        return Err(Error::NotFinite);
    }
    Ok((merged, report))
}

/// Root of a share of energy.
pub(crate) fn share(lost: f64, total: f64) -> f64 {
    if total > 0.0 { (lost / total).sqrt() } else { 0.0 }
}

/// Cuts to try, and the one that grouping is judged with.
fn cuts(
    geometry: &LayerGeometry,
    options: &ClosedFormOptions,
    measurement: Option<&Measurement>,
) -> Result<(Vec<usize>, usize), Error> {
    let one = |cut| Ok((vec![cut], cut));
    match &options.cut {
        Cut::Pairs(pairs) => one((*pairs).min(geometry.rotary_pairs())),
        Cut::Context(contexts) => match contexts.iter().max() {
            Some(longest) => one(context_cut(geometry, *longest)),
            None => Err(Error::Option("a cut from target contexts needs at least one context".into())),
        },
        Cut::Measured if geometry.qk_norm || geometry.rotary_pairs() == 0 => one(0),
        Cut::Measured if measurement.is_none() => {
            Err(Error::Option("a measured cut needs a measurement on calibration inputs".into()))
        }
        Cut::Measured => {
            let cuts = candidates(geometry);
            let middle = cuts[cuts.len() / 2];
            Ok((cuts, middle))
        }
    }
}

/// The parts every step needs.
struct Solver<'a> {
    weights: &'a LayerWeights,
    geometry: &'a LayerGeometry,
    statistics: &'a LayerStatistics,
    groups: &'a Groups,
    options: &'a ClosedFormOptions,
    progress: &'a Progressing<'a>,
}

impl<'a> Solver<'a> {
    fn group(&self, i: usize) -> Group<'a> {
        Group {
            geometry: self.geometry,
            statistics: self.statistics,
            members: &self.groups[i],
            progress: self.progress,
        }
    }

    fn groups(&self) -> impl Iterator<Item = Group<'a>> {
        (0..self.groups.len()).map(|i| self.group(i))
    }

    fn values(&self) -> Result<Vec<ValueSolution>, Error> {
        let solve = |g: Group<'_>| solve_values(&g, &g.output_metrics(self.weights), self.options.joint_iterations);
        self.groups().map(solve).collect()
    }

    fn keys(&self, cut: usize) -> Result<Vec<KeySolution>, Error> {
        self.groups().map(|g| solve_keys(&g, cut)).collect()
    }

    /// The mean of each group, queries as they are.
    fn mean_keys(&self) -> Vec<KeySolution> {
        let d = self.geometry.head_dim;
        let mean = |g: Group<'_>| KeySolution {
            rows: Mat::from_fn(d, g.members.len() * d, |i, j| {
                if j % d == i { 1.0 / crate::algebra::count(g.members.len()) } else { 0.0 }
            }),
            maps: g.query_heads().iter().map(|_| Mat::identity(d, d)).collect(),
        };
        self.groups().map(mean).collect()
    }

    /// Solves every cut, measures where there are several, writes the best into `merged`.
    fn best_keys(
        &self,
        cuts: &[usize],
        measurement: Option<&Measurement>,
        merged: &mut LayerWeights,
        report: &mut LayerReport,
    ) -> Result<(usize, Vec<KeySolution>), Error> {
        let mut best: Option<(f64, usize, Vec<KeySolution>)> = None;
        for &cut in cuts {
            let keys = self.keys(cut)?;
            let mut error = 0.0;
            if let (true, Some(measurement)) = (cuts.len() > 1, measurement) {
                self.write_keys(&keys, merged);
                error = measurement.relative_error(merged, self.groups.len(), self.progress)?;
                report.measured.push((cut, error));
            }
            if best.as_ref().is_none_or(|(least, ..)| error < *least) {
                best = Some((error, cut, keys));
            }
        }
        let (_, cut, keys) = best.ok_or(Error::NotFinite)?;
        self.write_keys(&keys, merged);
        Ok((cut, keys))
    }

    fn loss(&self, keys: Option<(&[KeySolution], usize)>, values: &[ValueSolution]) -> Result<Loss, Error> {
        let mut loss = Loss::default();
        for (i, group) in self.groups().enumerate() {
            let metrics = group.output_metrics(self.weights);
            loss.add(&predict(&group, &metrics, keys.map(|(k, cut)| (&k[i], cut)), &values[i])?);
        }
        Ok(loss)
    }

    /// A merged layer with its values and `o_proj`; keys and queries still to be written.
    fn with_values(&self, values: &[ValueSolution]) -> LayerWeights {
        let (geometry, weights) = (self.geometry, self.weights);
        let (d, hidden, heads) = (geometry.head_dim, geometry.hidden_size, geometry.num_attention_heads);
        let rows = self.groups.len() * d;
        let mut merged = LayerWeights {
            q_proj: vec![0.0; heads * d * hidden],
            k_proj: vec![0.0; rows * hidden],
            v_proj: vec![0.0; rows * hidden],
            o_proj: vec![0.0; hidden * heads * d],
            q_proj_bias: weights.q_proj_bias.as_ref().map(|b| vec![0.0; b.len()]),
            k_proj_bias: weights.k_proj_bias.as_ref().map(|_| vec![0.0; rows]),
            v_proj_bias: weights.v_proj_bias.as_ref().map(|_| vec![0.0; rows]),
        };
        let mut to = 0;
        for (i, group) in self.groups().enumerate() {
            let v =
                mix(values[i].rows.as_ref(), group.members, &weights.v_proj, weights.v_proj_bias.as_deref(), d, hidden);
            store_affine_head(v.as_ref(), i, hidden, &mut merged.v_proj, merged.v_proj_bias.as_mut());
            for (map, from) in values[i].maps.iter().zip(group.query_heads()) {
                let o = output_head(&weights.o_proj, from, heads, d, hidden) * map;
                store_output_head(o.as_ref(), to, heads, &mut merged.o_proj);
                to += 1;
            }
        }
        merged
    }

    fn write_keys(&self, keys: &[KeySolution], merged: &mut LayerWeights) {
        let (geometry, weights) = (self.geometry, self.weights);
        let (d, hidden) = (geometry.head_dim, geometry.hidden_size);
        let mut to = 0;
        for (i, group) in self.groups().enumerate() {
            let k =
                mix(keys[i].rows.as_ref(), group.members, &weights.k_proj, weights.k_proj_bias.as_deref(), d, hidden);
            store_affine_head(k.as_ref(), i, hidden, &mut merged.k_proj, merged.k_proj_bias.as_mut());
            for (map, from) in keys[i].maps.iter().zip(group.query_heads()) {
                let q = map * affine_head(&weights.q_proj, weights.q_proj_bias.as_deref(), from, d, hidden);
                store_affine_head(q.as_ref(), to, hidden, &mut merged.q_proj, merged.q_proj_bias.as_mut());
                to += 1;
            }
        }
    }
}

/// `rows * [head; head; ...]` of the members' projections, `[head_dim, hidden_size (+ 1)]`.
fn mix(
    rows: MatRef<'_, f64>,
    members: &[usize],
    weight: &[f32],
    bias: Option<&[f32]>,
    d: usize,
    hidden: usize,
) -> Mat<f64> {
    let mut sum = Mat::<f64>::zeros(d, hidden + usize::from(bias.is_some()));
    for (slot, head) in members.iter().enumerate() {
        sum += rows.subcols(slot * d, d) * affine_head(weight, bias, *head, d, hidden);
    }
    sum
}
