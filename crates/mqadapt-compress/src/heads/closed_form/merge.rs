//! A whole layer: groups, values, the cut, keys, and what it all costs.

use faer::Mat;
use mqadapt_core::{AttentionShape, DType, Progressing};

use super::assembly::Assembly;
use super::cut::{Cut, candidates, context_cut};
use super::group::Group;
use super::grouping::{choose, contiguous};
use super::keys::{KeySolution, solve_keys};
use super::measure::Measurement;
use super::normed::NormedKeys;
use super::predict::{Loss, predict};
use super::prior::Prior;
use super::report::{Fallback, LayerReport, Solution};
use super::values::{ValueSolution, solve_values};
use crate::Error;
use crate::layer::{LayerWeights, check_target};
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
    let normed = NormedKeys::new(weights, geometry, measurement, progress)?;
    let linear = normed.as_ref().map(|normed| normed.linear_k_proj(weights, geometry.hidden_size));
    let k_proj = if geometry.qk_norm { linear.as_deref() } else { Some(&weights.k_proj[..]) };
    let prior = Prior::new(weights, k_proj, geometry, statistics.shape().block_heads, progress)?;
    let (cuts, first_cut) = cuts(geometry, options, measurement)?;
    // heads of a norm over all of them keep their places where their mixes cannot make up for its weights
    let fixed = normed.is_none() && weights.k_norm.is_some();
    let groups = if options.regroup && !fixed {
        choose(weights, geometry, statistics, &prior, target, first_cut, progress)?
    } else {
        contiguous(geometry, target)
    };
    let assembly = Assembly { weights, geometry, groups: &groups, dtype: options.dtype };
    let solver = Solver { assembly, statistics, prior: &prior, normed: normed.as_ref(), options, progress };
    let mut best = solver.closed_form(&cuts, measurement, &mut report)?;
    match &normed {
        Some(normed) => best = solver.through_norms(normed, best, measurement, &mut report)?,
        None if geometry.qk_norm => report.fallbacks.push(Fallback::MeanKeys),
        None => {}
    }
    let neighbours = contiguous(geometry, target);
    let averaging = Solver { assembly: Assembly { groups: &neighbours, ..assembly }, ..solver };
    let mean = averaging.mean(best.cut, measurement)?;
    report.compared.push((Solution::Mean, mean.error));
    let mut taken = &solver;
    if mean.not_worse_than(&best) {
        (best, taken) = (mean, &averaging);
        report.fallbacks.clear();
        report.fallbacks.push(Fallback::Mean);
    }
    let judged = !geometry.qk_norm;
    let loss = taken.loss(judged.then_some((&best.keys, best.cut)), &best.values, None)?;
    report.output_error = share(loss.output_lost, loss.output_total);
    let averaged = |fallback: &Fallback| matches!(fallback, Fallback::MeanKeys | Fallback::Mean);
    report.cut = (judged || !report.fallbacks.iter().any(averaged)).then_some(best.cut);
    report.logit_error = judged.then(|| share(loss.logit_lost, loss.logit_total));
    if *taken.assembly.groups != neighbours {
        report.regrouped = Some(taken.assembly.groups.concat());
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
        Cut::Measured if geometry.rotary_pairs() == 0 => one(0),
        Cut::Measured if measurement.is_none() && geometry.qk_norm => one(0),
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
    assembly: Assembly<'a>,
    statistics: &'a LayerStatistics,
    prior: &'a Prior,
    /// Where the layer has q/k norms, and something to measure on.
    normed: Option<&'a NormedKeys<'a>>,
    options: &'a ClosedFormOptions,
    progress: &'a Progressing<'a>,
}

impl<'a> Solver<'a> {
    fn group(&self, i: usize) -> Group<'a> {
        Group {
            geometry: self.assembly.geometry,
            statistics: self.statistics,
            members: &self.assembly.groups[i],
            prior: Some(self.prior),
            progress: self.progress,
        }
    }

    fn groups(&self) -> impl Iterator<Item = Group<'a>> {
        (0..self.assembly.groups.len()).map(|i| self.group(i))
    }

    /// The closed form, with joint values where they are nearer than without.
    fn closed_form(
        &self,
        cuts: &[usize],
        measurement: Option<&Measurement>,
        report: &mut LayerReport,
    ) -> Result<Candidate, Error> {
        let solve =
            |g: Group<'_>| solve_values(&g, &g.output_metrics(self.assembly.weights), self.options.joint_iterations);
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

    /// Keys of a cut; the mean where q/k norms leave nothing else.
    fn keys(&self, cut: usize) -> Result<Vec<KeySolution>, Error> {
        if self.assembly.geometry.qk_norm && self.normed.is_none() {
            return Ok(self.mean_keys());
        }
        let solved = self.groups().map(|g| solve_keys(&g, cut)).collect::<Result<Vec<_>, Error>>()?;
        match self.normed {
            Some(normed) => self.before_norms(normed, &solved),
            None => Ok(solved),
        }
    }

    /// Keys of normalised heads as keys of the heads in front of the norms.
    fn before_norms(&self, normed: &NormedKeys<'_>, solved: &[KeySolution]) -> Result<Vec<KeySolution>, Error> {
        let mut first = 0;
        let in_front = |(group, solution): (Group<'_>, &KeySolution)| {
            let keys = normed.before_norms(&group, first, solution);
            first += keys.maps.len();
            keys
        };
        let mut keys: Vec<_> = self.groups().zip(solved).map(in_front).collect();
        normed.fit_scale(&self.assembly, &mut keys, self.progress)?;
        Ok(keys)
    }

    /// The nearest of a solution of a layer with q/k norms, the one with its keys searched and the one with them averaged.
    fn through_norms(
        &self,
        normed: &NormedKeys<'_>,
        solved: Candidate,
        measurement: Option<&Measurement>,
        report: &mut LayerReport,
    ) -> Result<Candidate, Error> {
        let start = self.assembly.with_values(&solved.values);
        let keys = normed.search(&self.assembly, &solved.keys, start, self.progress)?;
        let searched = self.candidate(solved.values.clone(), keys, solved.cut, measurement)?;
        let mut mean = self.mean_keys();
        if normed.is_over_heads() {
            mean = self.before_norms(normed, &mean)?;
        }
        let mean = self.candidate(solved.values.clone(), mean, solved.cut, measurement)?;
        report.compared.extend([(Solution::SearchedKeys, searched.error), (Solution::MeanKeys, mean.error)]);
        let best = if solved.not_worse_than(&searched) { solved } else { searched };
        if mean.not_worse_than(&best) {
            report.fallbacks.push(Fallback::MeanKeys);
            return Ok(mean);
        }
        Ok(best)
    }

    /// Each group averaged, queries and `o_proj` as they are.
    fn mean(&self, cut: usize, measurement: Option<&Measurement>) -> Result<Candidate, Error> {
        let d = self.assembly.geometry.head_dim;
        let values = |keys: &KeySolution| ValueSolution {
            rows: keys.rows.clone(),
            maps: vec![Mat::identity(d, d); keys.maps.len()],
        };
        let keys = self.mean_keys();
        self.candidate(keys.iter().map(values).collect(), keys, cut, measurement)
    }

    /// The mean of each group, queries as they are.
    fn mean_keys(&self) -> Vec<KeySolution> {
        let d = self.assembly.geometry.head_dim;
        let mean = |g: Group<'_>| KeySolution {
            rows: Mat::from_fn(d, g.members.len() * d, |i, j| {
                if j % d == i { 1.0 / crate::algebra::count(g.members.len()) } else { 0.0 }
            }),
            maps: g.query_heads().iter().map(|_| Mat::identity(d, d)).collect(),
            norm_scale: 1.0,
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
        let mut weights = self.assembly.with_values(&values);
        let mut best: Option<(f64, usize, Vec<KeySolution>)> = None;
        for &cut in cuts {
            let keys = self.keys(cut)?;
            self.assembly.write_keys(&keys, &mut weights);
            let error = self.error(&weights, &keys, cut, &values, measurement)?;
            if cuts.len() > 1 {
                report.measured.push((cut, error));
            }
            if best.as_ref().is_none_or(|(least, ..)| error < *least) {
                best = Some((error, cut, keys));
            }
        }
        let (error, cut, keys) = best.ok_or(Error::NotFinite)?;
        self.assembly.write_keys(&keys, &mut weights);
        Ok(Candidate { values, keys, cut, weights, error })
    }

    fn candidate(
        &self,
        values: Vec<ValueSolution>,
        keys: Vec<KeySolution>,
        cut: usize,
        measurement: Option<&Measurement>,
    ) -> Result<Candidate, Error> {
        let mut weights = self.assembly.with_values(&values);
        self.assembly.write_keys(&keys, &mut weights);
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
            measurement.relative_error(weights, self.assembly.groups.len(), self.progress)?
        } else {
            let loss = self.loss((!self.assembly.geometry.qk_norm).then_some((keys, cut)), values, Some(self.prior))?;
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
            let metrics = group.output_metrics(self.assembly.weights);
            loss.add(&predict(&group, &metrics, keys.map(|(k, cut)| (&k[i], cut)), &values[i])?);
        }
        Ok(loss)
    }
}
