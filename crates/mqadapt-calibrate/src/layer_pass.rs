//! What passes between the steps of one layer's merge.

use mqadapt_compress::closed_form::LayerReport;
use mqadapt_compress::{LayerWeights, QkNorm};
use mqadapt_core::AttentionShape;
use mqadapt_model::Activations;

use crate::calibration::LayerSample;

/// A merged layer.
#[derive(Debug, Clone, PartialEq)]
pub struct CalibratedLayer {
    /// Its weights.
    pub weights: LayerWeights,
    /// What was done, and the damage predicted.
    pub report: LayerReport,
    /// Relative error of the attention output on the converted stream, before and after the refit.
    pub refit: Option<(f64, f64)>,
}

/// What a pass of the original stream through a layer left.
pub(crate) struct LayerPass {
    pub(crate) geometry: AttentionShape,
    /// Where queries and keys are normalised.
    pub(crate) norms: Option<QkNorm>,
    /// None where statistics are saved.
    pub(crate) sample: Option<LayerSample>,
    /// What `o_proj` read of every sequence, for the refit; nothing where there is none.
    pub(crate) attention: Activations,
}
