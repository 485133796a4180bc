//! What can be wrong with a layer, its statistics or what is asked of them.

/// What keeps a merge from being computed.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The layer's counts contradict each other.
    #[error("attention geometry: {0}")]
    Geometry(String),
    /// A projection or activation has another length than the geometry gives it.
    #[error("{name} has {found} values, the layer's geometry needs {expected}")]
    Shape {
        /// Which tensor.
        name: &'static str,
        /// Values by the geometry.
        expected: usize,
        /// Values found.
        found: usize,
    },
    /// The target count does not divide the source's.
    #[error("{source_heads} K/V heads cannot become {target}: possible are {legal:?}")]
    Target {
        /// Heads asked for.
        target: usize,
        /// Heads of the source layer.
        source_heads: usize,
        /// The counts that divide it.
        legal: Vec<usize>,
    },
    /// The statistics are not of this layer, or do not cover the merge.
    #[error("the statistics do not fit: {0}; collect them again from this model")]
    StatisticsMismatch(String),
    /// Weights, activations or statistics hold infinities or NaN.
    #[error("a value is infinite or not a number, in the weights, the activations or the statistics")]
    NotFinite,
    /// An option has a value that cannot be.
    #[error("{0}")]
    Option(String),
    /// The user asked to stop.
    #[error(transparent)]
    Interrupted(#[from] mqadapt_core::Interrupted),
}
