//! A whole layer: groups, values, the cut, keys, and what it all costs.

use faer::{Mat, MatRef};
use mqadapt_core::{AttentionShape, DType, Progressing};

use super::cut::{Cut, candidates, context_cut};
use super::group::Group;
use super::grouping::{Groups, choose, contiguous};
use super::keys::{KeySolution, solve_keys};
use super::measure::Measurement;
use super::predict::{Loss, predict};
use super::prior::Prior;
use super::report::{Fallback, LayerReport, Solution};
use super::values::{ValueSolution, solve_values};
use crate::Error;
use crate::layer::{
    LayerWeights, affine_head, check_target, output_head, round_to, store_affine_head, store_output_head,
};
use crate::statistics::{LayerStatistics, Moment};

/// Choices of [`merge`].
#[derive(Clone, Debug, PartialEq)]
pub struct ClosedFormOptions {
    /// Where the rotary pairs are divided.
    pub cut: Cut,
    /// L-BFGS iterations of the joint values; 0 leaves the closed-form rows.
    pub joint_iterations: usize,
    /// May put heads that are not neighbours into one group.
    pub regroup: bool,
    /// What the merged weights are stored in: solutions are judged rounded to it.
    pub dtype: DType,
}

impl Default for ClosedFormOptions {
    fn default() -> Self {
        Self { cut: Cut::Context(vec![2048]), joint_iterations: 25, regroup: true, dtype: DType::F32 }
    }
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
    geometry: &AttentionShape,
    target: usize,
    statistics: &LayerStatistics,
    options: &ClosedFormOptions,
    measurement: Option<&Measurement>,
    progress: &Progressing<'_>,
) -> Result<(LayerWeights, LayerReport), Error> {
    check_target(geometry, target)?;
    weights.validate(geometry, geometry.num_key_value_heads)?;
    let mut report = LayerReport { num_key_value_heads: target, ..LayerReport::default() };
    if target == geometry.num_key_value_heads {
        report.logit_error = Some(0.0);
        return Ok((weights.clone(), report));
    }
    statistics.check(geometry, geometry.num_key_value_heads / target, &Moment::ALL)?;
    let prior = Prior::new(weights, geometry, statistics.shape().block_heads, progress)?;
    let (cuts, first_cut) = cuts(geometry, options, measurement)?;
    let groups = if options.regroup {
        choose(weights, geometry, statistics, &prior, target, first_cut, progress)?
    } else {
        contiguous(geometry, target)
    };
    let solver = Solver { weights, geometry, statistics, prior: &prior, groups: &groups, options, progress };
    let mut best = solver.closed_form(&cuts, measurement, &mut report)?;
    let neighbours = contiguous(geometry, target);
    let averaging = Solver { groups: &neighbours, ..solver };
    let mean = averaging.mean(best.cut, measurement)?;
    report.compared.push((Solution::Mean, mean.error));
    let mut taken = &solver;
    if mean.not_worse_than(&best) {
        (best, taken) = (mean, &averaging);
        report.fallbacks.retain(|fallback| *fallback != Fallback::PlainValues);
        report.fallbacks.push(Fallback::Mean);
    }
    let judged = !geometry.qk_norm;
    let loss = taken.loss(judged.then_some((&best.keys, best.cut)), &best.values, None)?;
    report.output_error = share(loss.output_lost, loss.output_total);
    report.cut = judged.then_some(best.cut);
    report.logit_error = judged.then(|| share(loss.logit_lost, loss.logit_total));
    if *taken.groups != neighbours {
        report.regrouped = Some(taken.groups.concat());
    }
    if best.weights.is_finite() { Ok((best.weights, report)) } else { Err(Error::NotFinite) }
}

/// Root of a share of energy.
pub(crate) fn share(lost: f64, total: f64) -> f64 {
    if total > 0.0 { (lost / total).sqrt() } else { 0.0 }
}

/// Cuts to try, and the one that grouping is judged with.
fn cuts(
    geometry: &AttentionShape,
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

/// A solved layer, and how far its attention output is from the original's.
struct Candidate {
    values: Vec<ValueSolution>,
    keys: Vec<KeySolution>,
    cut: usize,
    /// As they are stored.
    weights: LayerWeights,
    error: f64,
}

impl Candidate {
    /// Whether a simpler solution is to be taken in the place of another.
    fn not_worse_than(&self, other: &Self) -> bool {
        !other.error.is_finite() || self.error <= other.error
    }
}

/// The parts every step needs.
#[derive(Clone, Copy)]
struct Solver<'a> {
    weights: &'a LayerWeights,
    geometry: &'a AttentionShape,
    statistics: &'a LayerStatistics,
    prior: &'a Prior,
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
            prior: Some(self.prior),
            progress: self.progress,
        }
    }

    fn groups(&self) -> impl Iterator<Item = Group<'a>> {
        (0..self.groups.len()).map(|i| self.group(i))
    }

    /// The closed form, with joint values where they are nearer than without.
    fn closed_form(
        &self,
        cuts: &[usize],
        measurement: Option<&Measurement>,
        report: &mut LayerReport,
    ) -> Result<Candidate, Error> {
        if self.geometry.qk_norm {
            report.fallbacks.push(Fallback::MeanKeys);
        }
        let solve = |g: Group<'_>| solve_values(&g, &g.output_metrics(self.weights), self.options.joint_iterations);
        let solved = self.groups().map(solve).collect::<Result<Vec<_>, Error>>()?;
        let (mut plain, mut joint, mut searched) = (Vec::new(), Vec::new(), false);
        for values in solved {
            searched |= values.joint.is_some();
            joint.push(values.joint.unwrap_or_else(|| values.plain.clone()));
            plain.push(values.plain);
        }
        if !searched {
            let best = self.best_keys(cuts, plain, measurement, report)?;
            report.compared.push((Solution::Plain, best.error));
            return Ok(best);
        }
        let best = self.best_keys(cuts, joint, measurement, report)?;
        let simpler = self.candidate(plain, best.keys.clone(), best.cut, measurement)?;
        report.compared.extend([(Solution::Joint, best.error), (Solution::Plain, simpler.error)]);
        if !simpler.not_worse_than(&best) {
            return Ok(best);
        }
        report.fallbacks.push(Fallback::PlainValues);
        if report.measured.is_empty() {
            return Ok(simpler);
        }
        // the cut was chosen with the other values
        report.measured.clear();
        self.best_keys(cuts, simpler.values, measurement, report)
    }

    /// Each group averaged, queries and `o_proj` as they are.
    fn mean(&self, cut: usize, measurement: Option<&Measurement>) -> Result<Candidate, Error> {
        let d = self.geometry.head_dim;
        let values = |keys: &KeySolution| ValueSolution {
            rows: keys.rows.clone(),
            maps: vec![Mat::identity(d, d); keys.maps.len()],
        };
        let keys = self.mean_keys();
        self.candidate(keys.iter().map(values).collect(), keys, cut, measurement)
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

    /// Solves every cut, and takes the one whose attention output is nearest.
    fn best_keys(
        &self,
        cuts: &[usize],
        values: Vec<ValueSolution>,
        measurement: Option<&Measurement>,
        report: &mut LayerReport,
    ) -> Result<Candidate, Error> {
        let mut weights = self.with_values(&values);
        let mut best: Option<(f64, usize, Vec<KeySolution>)> = None;
        for &cut in cuts {
            let keys = if self.geometry.qk_norm {
                self.mean_keys()
            } else {
                self.groups().map(|g| solve_keys(&g, cut)).collect::<Result<_, Error>>()?
            };
            self.write_keys(&keys, &mut weights);
            let error = self.error(&weights, &keys, cut, &values, measurement)?;
            if cuts.len() > 1 {
                report.measured.push((cut, error));
            }
            if best.as_ref().is_none_or(|(least, ..)| error < *least) {
                best = Some((error, cut, keys));
            }
        }
        let (error, cut, keys) = best.ok_or(Error::NotFinite)?;
        self.write_keys(&keys, &mut weights);
        Ok(Candidate { values, keys, cut, weights, error })
    }

    fn candidate(
        &self,
        values: Vec<ValueSolution>,
        keys: Vec<KeySolution>,
        cut: usize,
        measurement: Option<&Measurement>,
    ) -> Result<Candidate, Error> {
        let mut weights = self.with_values(&values);
        self.write_keys(&keys, &mut weights);
        let error = self.error(&weights, &keys, cut, &values, measurement)?;
        Ok(Candidate { values, keys, cut, weights, error })
    }

    /// The relative error of a solution's attention output: measured, or else what the statistics predict of it, rounding
    /// and inputs that the text does not have included.
    fn error(
        &self,
        weights: &LayerWeights,
        keys: &[KeySolution],
        cut: usize,
        values: &[ValueSolution],
        measurement: Option<&Measurement>,
    ) -> Result<f64, Error> {
        if !weights.is_finite() {
            return Ok(f64::INFINITY);
        }
        let error = if let Some(measurement) = measurement {
            measurement.relative_error(weights, self.groups.len(), self.progress)?
        } else {
            let loss = self.loss((!self.geometry.qk_norm).then_some((keys, cut)), values, Some(self.prior))?;
            share(loss.output_lost, loss.output_total)
        };
        Ok(if error.is_nan() { f64::INFINITY } else { error })
    }

    /// What the statistics predict, together with a prior where there is one.
    fn loss(
        &self,
        keys: Option<(&[KeySolution], usize)>,
        values: &[ValueSolution],
        prior: Option<&'a Prior>,
    ) -> Result<Loss, Error> {
        let mut loss = Loss::default();
        for (i, group) in self.groups().enumerate() {
            let group = Group { prior, ..group };
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
        merged.round_to(self.options.dtype);
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
        let biases = [&mut merged.q_proj_bias, &mut merged.k_proj_bias].into_iter().flatten();
        for values in [&mut merged.q_proj, &mut merged.k_proj].into_iter().chain(biases) {
            round_to(values, self.options.dtype);
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
