//! What a method is that needs the whole attention of a layer. In: the layer's weights, statistics and inputs; out: new weights,
//! and a report of what was done.

use mqadapt_core::{AttentionShape, DType, LayerCache, Progressing};

use crate::heads::closed_form::LayerReport;
use crate::qk_norm::QkNorm;
use crate::statistics::{LayerStatistics, Moment};
use crate::{Error, LayerWeights};

/// A method that merges the attention of a layer from statistics of calibration text.
pub trait LayerMerge: Sync {
    /// What is collected from the text for it.
    fn needs(&self) -> Needs;

    /// The options of a calibration that it takes.
    fn options(&self) -> &'static [MethodOption];

    /// Merges a layer.
    ///
    /// # Errors
    /// [`Error::Target`], [`Error::Shape`], [`Error::StatisticsMismatch`], [`Error::Option`], [`Error::NotFinite`],
    /// [`Error::Interrupted`].
    fn merge(&self, job: LayerJob<'_>, progress: &Progressing<'_>) -> Result<(LayerWeights, LayerReport), Error>;
}

/// What a method needs of the calibration text, besides the heads' contributions, which cost nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// The sums.
    pub moments: &'static [Moment],
    /// Some of the layer's inputs, on which solutions are measured.
    pub inputs: bool,
}

/// An option that a method may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MethodOption {
    /// Refit `o_proj` of every merged layer on the converted stream.
    Sequential,
    /// Gradient steps on a merged layer before the refit.
    Refine,
    /// A fixed number of fast rotary pairs.
    FastPairs,
    /// Heads that are not neighbours may share a group.
    Regroup,
}

impl MethodOption {
    /// Its name in Python and in manifests.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sequential => "sequential",
            Self::Refine => "refine",
            Self::FastPairs => "fast_pairs",
            Self::Regroup => "regroup",
        }
    }
}

/// What the merge of one layer is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerOptions {
    /// Fast rotary pairs; `None`: as measured on the layer's inputs.
    pub fast_pairs: Option<usize>,
    /// Heads that are not neighbours may share a group.
    pub regroup: bool,
    /// What the merged weights are stored in: solutions are judged rounded to it.
    pub dtype: DType,
}

impl Default for LayerOptions {
    fn default() -> Self {
        Self { fast_pairs: None, regroup: true, dtype: DType::F32 }
    }
}

/// One layer to merge.
#[derive(Debug, Clone)]
pub struct LayerJob<'a> {
    /// Its weights.
    pub weights: &'a LayerWeights,
    /// Its attention.
    pub shape: &'a AttentionShape,
    /// What it is to cache.
    pub cache: LayerCache,
    /// Sums over the calibration text.
    pub statistics: &'a LayerStatistics,
    /// Norms of queries and keys, where it has them.
    pub norms: Option<QkNorm>,
    /// Inputs of the length of a target context, `[tokens, hidden_size]` each.
    pub inputs: Vec<Vec<f32>>,
    /// Inputs of other lengths.
    pub other_inputs: Vec<Vec<f32>>,
    /// Contexts in tokens that the result is for.
    pub target_contexts: &'a [usize],
    /// What the merge is told.
    pub options: LayerOptions,
}
