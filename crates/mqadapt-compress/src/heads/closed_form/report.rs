//! What a merge says of a layer: what was done, what was compared, and what could not be done.

/// Something the closed form cannot do for this layer and did another way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fallback {
    /// Keys of a layer with q/k norms are the mean of their group: other mixes need calibration inputs, or do not lower the
    /// error of the attention output.
    MeanKeys,
    /// The joint step is left out: with it, the attention output is no nearer.
    PlainValues,
    /// The layer is merged as `mean` merges it: by the closed form, the attention output is no nearer.
    Mean,
    /// The gradient steps are left out: after them, the attention output on the converted stream is no nearer.
    NotRefined,
    /// `o_proj` is not refitted: with the refit, the attention output on the converted stream is no nearer.
    NotRefitted,
}

impl Fallback {
    /// One line for reports and manifests.
    #[must_use]
    pub fn describe(self) -> &'static str {
        match self {
            Self::MeanKeys => "keys mean-pooled: q/k norms, and other mixes do not lower the measured error",
            Self::PlainValues => "values without the joint step: it does not lower the error of the attention output",
            Self::Mean => "heads averaged as by mean: the closed form does not lower the error of the attention output",
            Self::NotRefined => "gradient steps dropped: they do not lower the error of the attention output",
            Self::NotRefitted => "o_proj not refitted: the refit does not lower the error of the attention output",
        }
    }
}

/// A solution for a layer, simplest last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Solution {
    /// Keys of a layer with q/k norms after the search, values as below.
    SearchedKeys,
    /// The closed form with joint values.
    Joint,
    /// The closed form, its rows as they are.
    Plain,
    /// Keys of a layer with q/k norms averaged, values as above.
    MeanKeys,
    /// Contiguous heads averaged.
    Mean,
}

impl Solution {
    /// Its name in manifests.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::SearchedKeys => "searched_keys",
            Self::Joint => "joint_values",
            Self::Plain => "closed_form_rows",
            Self::MeanKeys => "mean_keys",
            Self::Mean => "mean",
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
    /// Relative attention-output error of every solution of the layer that was compared, the taken one among them: of the
    /// weights as they are stored, on calibration inputs; as the statistics predict it where there are none.
    pub compared: Vec<(Solution, f64)>,
    /// Source K/V heads in the order of the groups, where not contiguous.
    pub regrouped: Option<Vec<usize>>,
    /// Source K/V heads that are left, where the method prunes.
    pub kept: Option<Vec<usize>>,
    /// What was done another way.
    pub fallbacks: Vec<Fallback>,
}
