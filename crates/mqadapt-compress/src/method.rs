//! What a merge method is, and the table of all of them.

use mqadapt_core::family::LayerTensor;

use crate::heads::closed_form::{ClosedForm, FixedMerge};
use crate::heads::first::First;
use crate::heads::mean::Mean;
use crate::heads::prune::Prune;
use crate::heads::random::Random;
use crate::heads::row_merge::{MergeOptions, RowMerge, RowsAt};
use crate::layer_merge::{LayerMerge, MethodOption};

/// Every method. A new one is a file and an entry here.
pub static METHODS: &[&Method] = &[
    &Method {
        name: "mean",
        summary: "mean of the group's heads (GQA paper, section 2.1)",
        kind: MethodKind::Rows(&Mean),
        prediction: Some(Prediction::Fixed(FixedMerge::Mean)),
    },
    &Method {
        name: "first",
        summary: "first head of the group (the GQA paper's ablation)",
        kind: MethodKind::Rows(&First),
        prediction: Some(Prediction::Fixed(FixedMerge::First)),
    },
    &Method {
        name: "random",
        summary: "freshly initialised, seeded (the GQA paper's ablation)",
        kind: MethodKind::Rows(&Random),
        prediction: None,
    },
    &Method {
        name: "closed-form",
        summary: "second-order solution from calibration text; q_proj and o_proj compensated",
        kind: MethodKind::Layer(&ClosedForm),
        prediction: Some(Prediction::Merged),
    },
    &Method {
        name: "prune",
        summary: "strongest head of the group by calibration text, the others silenced (NVIDIA Puzzle's default)",
        kind: MethodKind::Layer(&Prune),
        prediction: Some(Prediction::Fixed(FixedMerge::Prune)),
    },
];

/// A merge method and how it works.
pub struct Method {
    /// Its name on the command line and in manifests.
    pub name: &'static str,
    /// What it does, in a line.
    pub summary: &'static str,
    /// How it works.
    pub kind: MethodKind,
    /// How statistics predict its damage, where they do.
    pub prediction: Option<Prediction>,
}

/// How a method works.
#[derive(Clone, Copy)]
pub enum MethodKind {
    /// On K/V rows, independently of each other and of every other tensor.
    Rows(&'static dyn RowMerge),
    /// On the whole attention of a layer, from statistics of calibration text.
    Layer(&'static dyn LayerMerge),
}

/// How statistics of a layer predict what a method costs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prediction {
    /// From the statistics alone: the merge is known beforehand.
    Fixed(FixedMerge),
    /// By merging the layer.
    Merged,
}

impl Method {
    /// The method as one that works on K/V rows, if it is such a one.
    #[must_use]
    pub fn rows(&self) -> Option<&'static dyn RowMerge> {
        match self.kind {
            MethodKind::Rows(rows) => Some(rows),
            MethodKind::Layer(_) => None,
        }
    }

    /// The method as one that needs whole layers and calibration text, if it is such a one.
    #[must_use]
    pub fn layer(&self) -> Option<&'static dyn LayerMerge> {
        match self.kind {
            MethodKind::Rows(_) => None,
            MethodKind::Layer(layer) => Some(layer),
        }
    }

    /// The options of a calibration that it takes.
    #[must_use]
    pub fn options(&self) -> &'static [MethodOption] {
        self.layer().map_or(&[], |layer| layer.options())
    }
}

/// The method of this name.
#[must_use]
pub fn method(name: &str) -> Option<&'static Method> {
    METHODS.iter().copied().find(|method| method.name == name)
}

/// Merges a whole tensor. `source`: `[G * head_dim, width]`, row-major, of `G = num_key_value_heads` heads;
/// `merged`: `[G' * head_dim, width]`, where its length says what `G'` is.
///
/// # Panics
/// If `G'` is not a divisor of `G`: plans are validated before.
pub fn merge_tensor(
    method: &dyn RowMerge,
    options: &MergeOptions,
    tensor: LayerTensor,
    source: &[f32],
    num_key_value_heads: usize,
    merged: &mut [f32],
) {
    let head = source.len() / num_key_value_heads; // values of one head
    assert!(head > 0 && merged.len().is_multiple_of(head) && num_key_value_heads.is_multiple_of(merged.len() / head));
    let group = num_key_value_heads / (merged.len() / head); // source heads for each target head
    for (target, (out, sources)) in merged.chunks_exact_mut(head).zip(source.chunks_exact(head * group)).enumerate() {
        let heads: Vec<&[f32]> = sources.chunks_exact(head).collect();
        method.merge(options, RowsAt { tensor, first_value: (target * head) as u64 }, &heads, out);
    }
}

#[cfg(test)]
mod tests {
    use mqadapt_core::family::Module;

    use super::*;

    /// Every registered row method: the result of a piece does not depend on how the tensor is cut.
    #[test]
    fn pieces_equal_the_whole() {
        let source: Vec<f32> = (0..4 * 6 * 5u16).map(|i| f32::from(i * 37 % 101) - 50.0).collect();
        let options = MergeOptions { seed: 7, ..MergeOptions::default() };
        for method in METHODS {
            let Some(rows) = method.rows() else { continue };
            let tensor = LayerTensor::weight(3, Module::VProj);
            let mut whole = vec![0.0; 2 * 30];
            merge_tensor(rows, &options, tensor, &source, 4, &mut whole);
            for cut in [1, 5, 7, 29] {
                let heads: Vec<_> = source[60..].chunks_exact(30).map(|head| &head[cut..]).collect();
                let mut piece = vec![0.0; 30 - cut];
                rows.merge(&options, RowsAt { tensor, first_value: 30 + cut as u64 }, &heads, &mut piece);
                assert_eq!(piece, whole[30 + cut..], "{}", method.name);
            }
        }
    }

    #[test]
    fn repeated_heads_merge_back() {
        let head: Vec<f32> = (0..40u8).map(|i| 1.0 / (f32::from(i) + 3.0)).collect();
        for group in [2, 4, 8, 3, 5, 6] {
            let source: Vec<f32> = (0..group).flat_map(|_| head.clone()).collect();
            for method in ["mean", "first"].map(|name| method(name).unwrap()) {
                let mut merged = vec![0.0; 40];
                merge_tensor(
                    method.rows().unwrap(),
                    &MergeOptions::default(),
                    LayerTensor::weight(0, Module::KProj),
                    &source,
                    group,
                    &mut merged,
                );
                assert_eq!(merged, head, "{} of {group}", method.name);
            }
        }
    }

    #[test]
    fn random_is_seeded_and_spread() {
        let draw = |seed, tensor| {
            let mut out = vec![0.0; 20_000];
            let options = MergeOptions { seed, initializer_range: 0.5 };
            merge_tensor(method("random").unwrap().rows().unwrap(), &options, tensor, &vec![1.0; 40_000], 2, &mut out);
            out
        };
        let (one, other) =
            (draw(1, LayerTensor::weight(0, Module::KProj)), draw(2, LayerTensor::weight(0, Module::KProj)));
        assert_eq!(one, draw(1, LayerTensor::weight(0, Module::KProj)));
        assert!(
            one != other
                && one != draw(1, LayerTensor::weight(0, Module::VProj))
                && one != draw(1, LayerTensor::weight(1, Module::KProj))
        );
        let count = one.len() as f32;
        let mean = one.iter().sum::<f32>() / count;
        let variance = one.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / count;
        // standard errors at 20,000 draws: 0.0035 of the mean, 0.0025 of the variance; five of them
        assert!(mean.abs() < 0.018 && (variance - 0.25).abs() < 0.0125, "{mean} {variance}");
        assert!(draw(1, LayerTensor::bias(0, Module::KProj)).iter().all(|x| *x == 0.0));
    }
}
