//! What a calibration is told beside its text: one type, from which the Python signature, the command line and the manifest
//! follow.

use mqadapt_compress::{LayerOptions, MethodOption, RefineOptions};
use mqadapt_core::DType;
use serde_json::{Map, Value, json};

/// What a method that merges from calibration text is told.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CalibrationOptions {
    /// Refit `o_proj` of every merged layer on the converted stream.
    pub sequential: bool,
    /// Before that, gradient steps on its projections; they make the merge sequential too.
    pub refine: Option<RefineOptions>,
    /// Fast rotary pairs; `None`: as measured.
    pub fast_pairs: Option<usize>,
    /// Heads that are not neighbours may share a group.
    pub regroup: bool,
}

impl Default for CalibrationOptions {
    fn default() -> Self {
        Self { sequential: false, refine: None, fast_pairs: None, regroup: true }
    }
}

impl CalibrationOptions {
    /// The options that are not left at their default.
    #[must_use]
    pub fn given(&self) -> Vec<MethodOption> {
        [
            (self.sequential && self.refine.is_none(), MethodOption::Sequential),
            (self.refine.is_some(), MethodOption::Refine),
            (self.fast_pairs.is_some(), MethodOption::FastPairs),
            (!self.regroup, MethodOption::Regroup),
        ]
        .into_iter()
        .filter_map(|(given, option)| given.then_some(option))
        .collect()
    }

    /// What a manifest says of them.
    #[must_use]
    pub fn describe(&self) -> Map<String, Value> {
        let mut out = Map::new();
        let mut add = |option: MethodOption, value: Value| out.insert(option.name().to_owned(), value);
        add(MethodOption::Sequential, json!(self.is_sequential()));
        if let Some(refine) = self.refine {
            add(MethodOption::Refine, json!(refine.steps));
        }
        if let Some(pairs) = self.fast_pairs {
            add(MethodOption::FastPairs, json!(pairs));
        }
        add(MethodOption::Regroup, json!(self.regroup));
        out
    }

    /// Whether the merge needs the converted residual stream.
    #[must_use]
    pub fn is_sequential(&self) -> bool {
        self.sequential || self.refine.is_some()
    }

    /// What the merge of a layer is told; `dtype` is that of the merged weights.
    pub(crate) fn of_layer(&self, dtype: DType) -> LayerOptions {
        LayerOptions { fast_pairs: self.fast_pairs, regroup: self.regroup, dtype }
    }
}
