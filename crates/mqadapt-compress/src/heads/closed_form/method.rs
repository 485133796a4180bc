//! The closed form as a method. In: a layer to merge; out: its new weights and a report.

use mqadapt_core::Progressing;

use super::cut::Cut;
use super::measure::Measurement;
use super::merge::{ClosedFormOptions, merge};
use super::report::LayerReport;
use crate::layer_merge::{LayerJob, LayerMerge, LayerOptions, MethodOption, Needs};
use crate::statistics::Moment;
use crate::{Error, LayerWeights};

/// The method.
pub(crate) struct ClosedForm;

impl LayerMerge for ClosedForm {
    fn needs(&self) -> Needs {
        Needs { moments: &Moment::ALL, inputs: true }
    }

    fn options(&self) -> &'static [MethodOption] {
        &[MethodOption::Sequential, MethodOption::Refine, MethodOption::FastPairs, MethodOption::Regroup]
    }

    /// Cuts and solutions are chosen by a measurement. Where there is nothing to measure on at the target contexts, the cut
    /// follows from them, and solutions are compared on what there is.
    fn merge(&self, job: LayerJob<'_>, progress: &Progressing<'_>) -> Result<(LayerWeights, LayerReport), Error> {
        let LayerJob { weights, shape, cache, statistics, norms, mut inputs, other_inputs, target_contexts, options } =
            job;
        let LayerOptions { fast_pairs, regroup, dtype } = options;
        let cut = fast_pairs.map_or(Cut::Measured, Cut::Pairs);
        let mut options = ClosedFormOptions { cut, regroup, dtype, ..ClosedFormOptions::default() };
        if inputs.iter().all(Vec::is_empty) {
            inputs = other_inputs;
            if options.cut == Cut::Measured {
                options.cut = Cut::Context(target_contexts.to_vec());
            }
        }
        let empty = inputs.iter().all(Vec::is_empty);
        let measurement = if empty { None } else { Some(Measurement::new(weights, shape, norms, inputs, progress)?) };
        merge(weights, shape, cache.num_key_value_heads(), statistics, &options, measurement.as_ref(), progress)
    }
}
