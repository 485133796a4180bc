//! `Calibration`: what methods that merge from text are told.

use std::path::PathBuf;

use mqadapt_calibrate::{
    CalibratedMerge, CalibrationOptions, Error, StatisticsFile, collect_statistics, predicted_errors,
};
use mqadapt_checkpoint::Checkpoint;
use mqadapt_compress::{METHODS, Method, RefineOptions};
use mqadapt_core::{DType, Progress};
use mqadapt_model::Spill;
use pyo3::prelude::*;
use serde_json::{Map, Value, json};

use crate::arguments::{self, Place, Text, Whole, method as parse_method};
use crate::config::LayerCache;
use crate::errors::{OrRaise, argument};
use crate::source::local_path;
use crate::work;

/// Longest target context.
const LONGEST_CONTEXT: u64 = 1 << 31;
/// Most gradient steps of a refinement.
const MOST_STEPS: u64 = 1 << 20;

/// Calibration text and options of the methods that need it.
#[pyclass(module = "mqadapt_rs", frozen)]
pub(crate) struct Calibration {
    /// Without target contexts where none were named and only the statistics know the windows.
    text: mqadapt_calibrate::Calibration,
    stats: Option<PathBuf>,
    options: CalibrationOptions,
}

#[pymethods]
impl Calibration {
    /// Token sequences, each of them from position 0.
    #[new]
    #[pyo3(
        signature = (sequences = None, *, target_context = None, stats = None, sequential = false,
            refine = Whole::from(0), fast_pairs = None, regroup = true),
        text_signature = "(sequences=None, *, target_context=None, stats=None, sequential=False, refine=0, fast_pairs=None, regroup=True)"
    )]
    fn new(
        sequences: Option<&Bound<'_, PyAny>>,
        target_context: Option<Vec<Whole>>,
        stats: Option<Place>,
        sequential: bool,
        refine: Whole,
        fast_pairs: Option<Whole>,
        regroup: bool,
    ) -> PyResult<Self> {
        let sequences = sequences.map(arguments::sequences).transpose()?.unwrap_or_default();
        if target_context.as_ref().is_some_and(Vec::is_empty) {
            return Err(argument("target_context must be one context length or more, in tokens"));
        }
        // rotary tables and the counts of distances are as long
        let contexts = target_context.unwrap_or_default();
        let contexts = contexts.iter().map(|context| context.within("target_context", 1..=LONGEST_CONTEXT));
        let target_contexts = contexts.collect::<PyResult<_>>()?;
        let refine = refine.within("refine", 0..=MOST_STEPS)?;
        let fast_pairs = fast_pairs.map(|pairs| pairs.count("fast_pairs")).transpose()?;
        let stats = stats.map(|stats| stats.0);
        let mut text = mqadapt_calibrate::Calibration { sequences, target_contexts };
        let lengths = text.lengths();
        if let (Some(longest), true) = (lengths.last(), text.target_contexts.is_empty()) {
            text.target_contexts = mqadapt_calibrate::Calibration::usual_contexts(*longest);
        }
        text.check_target_contexts(&lengths).or_raise()?;
        let refine = (refine > 0).then(|| RefineOptions { steps: refine, ..RefineOptions::default() });
        let options = CalibrationOptions { sequential, refine, fast_pairs, regroup };
        Ok(Self { text, stats, options })
    }

    /// Tokens of the text.
    #[getter]
    fn tokens(&self) -> usize {
        self.text.sequences.iter().map(Vec::len).sum()
    }

    /// Lengths of the windows in tokens, ascending; those of the saved statistics where there is no text.
    #[getter]
    fn context(&self) -> Vec<usize> {
        self.windows(self.described().as_ref())
    }

    /// Contexts that the result is for.
    #[getter]
    fn target_context(&self) -> Vec<usize> {
        self.text_for(self.described().as_ref()).target_contexts
    }

    /// Names the text and its windows.
    #[getter]
    fn fingerprint(&self) -> String {
        self.text.fingerprint()
    }

    /// What the statistics say of merging single layers.
    #[pyo3(signature = (src, method, layers, *, progress = None))]
    fn predicted_errors(
        &self,
        src: &Bound<'_, PyAny>,
        method: Text,
        layers: Vec<(Whole, Bound<'_, PyAny>)>,
        progress: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Vec<f64>> {
        let layers: PyResult<Vec<(usize, usize)>> = layers
            .iter()
            .map(|(layer, choice)| {
                let heads = match choice.extract::<LayerCache>() {
                    Ok(cache) => cache.0.num_key_value_heads(),
                    Err(_) => choice.extract::<Whole>()?.count("a head count of layers")?,
                };
                Ok((layer.count("a layer of layers")?, heads))
            })
            .collect();
        let layers = layers?;
        let method = parse_method(&method)?;
        let (py, path) = (src.py(), local_path(src, false)?);
        work::run(py, progress, |progress| {
            let checkpoint = Checkpoint::open(&path)?;
            let saved = self.statistics(&checkpoint, None, progress)?.ok_or_else(|| Error::Argument {
                name: "stats",
                detail: "must name the file of the statistics, to be read or written".to_owned(),
            })?;
            let contexts = self.text_for(Some(&saved)).target_contexts;
            predicted_errors(&checkpoint, saved, method, &self.options, &contexts, &layers, progress)
        })
    }

    fn __repr__(&self) -> String {
        let (sequences, tokens) = (self.text.sequences.len(), self.tokens());
        let (context, target) = (self.context(), self.target_context());
        format!("Calibration({sequences} sequences, {tokens} tokens, context={context:?}, target_context={target:?})")
    }
}

/// The calibration of a method that needs one; refused where the method does nothing with it, or with one of its options.
pub(crate) fn needed<'a>(
    method: &Method,
    calibration: Option<&'a Bound<'_, Calibration>>,
) -> PyResult<Option<&'a Calibration>> {
    let name = method.name;
    match (method.layer(), calibration) {
        (None, None) => Ok(None),
        (None, Some(_)) => {
            let others = names(|method| method.layer().is_some());
            Err(argument(format!("method '{name}' reads no text: leave the calibration out, or choose {others}")))
        }
        (Some(_), Some(calibration)) => {
            let calibration = calibration.get();
            let useless = calibration.options.given().into_iter().find(|option| !method.options().contains(option));
            useless.map_or(Ok(Some(calibration)), |option| {
                let (option, others) = (option.name(), names(|method| method.options().contains(&option)));
                Err(argument(format!("method '{name}' does not take {option}: leave it out, or choose {others}")))
            })
        }
        (Some(_), None) => Err(argument(format!(
            "method '{name}' merges from text: give it a calibration (--calibration FILE or --stats FILE)"
        ))),
    }
}

/// The methods of which something holds, in words.
fn names(holds: impl Fn(&Method) -> bool) -> String {
    METHODS.iter().filter(|method| holds(method)).map(|method| method.name).collect::<Vec<_>>().join(" or ")
}

impl Calibration {
    /// The merge of a checkpoint, its activations in memory unless `spill` says otherwise; collects the statistics first where they are to be saved and are not there yet.
    pub(crate) fn merge<'a>(
        &self,
        checkpoint: &'a Checkpoint,
        method: &'static Method,
        dtype: DType,
        spill: Option<Spill>,
        progress: &dyn Progress,
    ) -> Result<CalibratedMerge<'a>, Error> {
        let saved = self.statistics(checkpoint, spill.as_ref(), progress)?;
        let text = self.text_for(saved.as_ref());
        let merge = CalibratedMerge::new(checkpoint, text, method, self.options, saved, dtype)?;
        Ok(match spill {
            Some(spill) => merge.with_spill(spill),
            None => merge,
        })
    }

    /// The saved statistics; collected first where they are not there yet. None where no file is named.
    fn statistics(
        &self,
        checkpoint: &Checkpoint,
        spill: Option<&Spill>,
        progress: &dyn Progress,
    ) -> Result<Option<StatisticsFile>, Error> {
        match &self.stats {
            None => Ok(None),
            Some(path) if path.exists() => self.saved(StatisticsFile::open(path)?).map(Some),
            Some(path) => {
                if self.tokens() == 0 {
                    let detail =
                        format!("is needed to write the statistics file {}, which does not exist", path.display());
                    return Err(Error::Argument { name: "calibration", detail });
                }
                collect_statistics(checkpoint, &self.text, path, spill, progress).map(Some)
            }
        }
    }

    /// The saved statistics where they stand for the text; what is wrong with their file is said where it is used.
    fn described(&self) -> Option<StatisticsFile> {
        let path = self.stats.as_ref().filter(|_| self.tokens() == 0)?;
        StatisticsFile::open(path).ok()
    }

    /// Lengths of the windows, ascending.
    fn windows(&self, saved: Option<&StatisticsFile>) -> Vec<usize> {
        match saved {
            Some(saved) if self.tokens() == 0 => saved.lengths(),
            _ => self.text.lengths(),
        }
    }

    /// The text, with the target contexts that follow from the windows where none were named.
    fn text_for(&self, saved: Option<&StatisticsFile>) -> mqadapt_calibrate::Calibration {
        let mut text = self.text.clone();
        if text.target_contexts.is_empty() {
            let longest = self.windows(saved).last().copied().unwrap_or(usize::MAX);
            text.target_contexts = mqadapt_calibrate::Calibration::usual_contexts(longest);
        }
        text
    }

    /// A file that was collected from this text, where there is one.
    fn saved(&self, saved: StatisticsFile) -> Result<StatisticsFile, Error> {
        let fingerprint = self.text.fingerprint();
        if self.tokens() == 0 || saved.text() == fingerprint {
            return Ok(saved);
        }
        let detail = "was collected from another text or other windows than were given; leave the text out to use it, or \
                      name a new file";
        Err(Error::Argument { name: "stats", detail: detail.to_owned() })
    }

    /// What the manifest says of it.
    pub(crate) fn describe(&self) -> Map<String, Value> {
        let mut out = Map::new();
        let saved = self.described();
        let (tokens, text) = match &saved {
            Some(saved) => (saved.tokens(), saved.text().to_owned()),
            None => (self.tokens() as u64, self.text.fingerprint()),
        };
        out.insert("calibration_tokens".to_owned(), json!(tokens));
        out.insert("calibration_fingerprint".to_owned(), json!(text));
        out.insert("calibration_context".to_owned(), json!(self.windows(saved.as_ref())));
        out.insert("target_context".to_owned(), json!(self.text_for(saved.as_ref()).target_contexts));
        out.extend(self.options.describe());
        out
    }
}
