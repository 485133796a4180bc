//! Which layers attend to a window, and which rotate positions. In: `sliding_window`, `layer_types` and the fields around them;
//! out: a window for each layer.

use serde_json::Value;

use super::fields::Fields;
use crate::Result;
use crate::family::{Family, Windows};

/// The window of each layer; and which layers count as `sliding_attention`, with or without a window.
type LayerWindows = (Vec<Option<usize>>, Vec<bool>);

impl Fields<'_> {
    /// The window of each layer (`configuration_<model_type>.py`), and which layers count as `sliding_attention`.
    pub(super) fn sliding_windows(&self, family: &Family, num_hidden_layers: usize) -> Result<LayerWindows> {
        let unset = family.defaults.sliding_window.filter(|_| !self.is_null("sliding_window"));
        let window = self.size("sliding_window")?.or(unset);
        let types = self.layer_types(num_hidden_layers)?;
        let slides = match family.forward.windows {
            Windows::Never => self.without_windows(family, num_hidden_layers, types)?,
            Windows::Every => {
                let slides = vec![window.is_some(); num_hidden_layers];
                self.same_types(family, types, slides, window.is_some())?
            }
            Windows::Flagged => self.flagged(family, num_hidden_layers, types, window.is_some())?,
            Windows::WithoutRope => self.without_rope(num_hidden_layers, types, window.is_some())?,
            Windows::Pattern { full_every, field } => {
                let full_every = field.map(|field| self.size(field)).transpose()?.flatten().unwrap_or(full_every);
                let pattern = || (1..=num_hidden_layers).map(|nth| !nth.is_multiple_of(full_every)).collect();
                types.unwrap_or_else(pattern)
            }
        };
        if window.is_none() && matches!(family.forward.windows, Windows::Pattern { .. }) && slides.contains(&true) {
            return Err(self.wrong("sliding_window", "a number: layers of type sliding_attention have a window"));
        }
        Ok((slides.iter().map(|slides| window.filter(|_| *slides)).collect(), slides))
    }

    fn without_windows(&self, family: &Family, layers: usize, types: Option<Vec<bool>>) -> Result<Vec<bool>> {
        if self.get("sliding_window").is_some() {
            let expected = format!(
                "null or absent: a {} has no windows (transformers would cut its cache by it, and not its prompts)",
                family.model_type
            );
            return Err(self.wrong("sliding_window", &expected));
        }
        self.same_types(family, types, vec![false; layers], false)
    }

    /// Qwen's: `layer_types`, or from `max_window_layers` on.
    fn flagged(&self, family: &Family, layers: usize, types: Option<Vec<bool>>, has_window: bool) -> Result<Vec<bool>> {
        let has_window = has_window && self.flag("use_sliding_window")?.unwrap_or(false);
        if let Some(types) = types {
            if !has_window && types.contains(&true) {
                return Err(self.wrong(
                    "layer_types",
                    "full_attention in every layer where use_sliding_window is not true or sliding_window is null",
                ));
            }
            return Ok(types);
        }
        // 0 is a legal max_window_layers: every layer has a window
        let first = self.get("max_window_layers").map_or(Some(28), Value::as_u64);
        let first = first.ok_or_else(|| self.wrong("max_window_layers", "a whole number"))?;
        let slides = (0..layers).map(|idx| has_window && idx as u64 >= first).collect();
        self.same_types(family, None, slides, has_window)
    }

    /// SmolLM3's: `layer_types`, or the layers that rotate nothing.
    fn without_rope(&self, layers: usize, types: Option<Vec<bool>>, has_window: bool) -> Result<Vec<bool>> {
        let has_window = has_window && self.flag("use_sliding_window")?.unwrap_or(false);
        let default = || Ok(self.rotated_layers(layers)?.into_iter().map(|rotated| has_window && !rotated).collect());
        let slides: Vec<bool> = types.map_or_else(default, Ok)?;
        if !has_window && slides.contains(&true) {
            return Err(self.wrong(
                "layer_types",
                "full_attention in every layer where use_sliding_window is not true or sliding_window is null",
            ));
        }
        Ok(slides)
    }

    /// transformers takes a Mistral with `layer_types` for a Ministral; of the others, it cuts the cache by them, not prompts.
    fn same_types(
        &self,
        family: &Family,
        types: Option<Vec<bool>>,
        slides: Vec<bool>,
        has_window: bool,
    ) -> Result<Vec<bool>> {
        if types.is_some_and(|types| types != slides) {
            let kind = if has_window { "sliding_attention" } else { "full_attention" };
            let expected = format!("{kind} in every layer, as a {} of this sliding_window has", family.model_type);
            return Err(self.wrong("layer_types", &expected));
        }
        Ok(slides)
    }

    /// Which layers rotate positions (`configuration_smollm3.py`).
    pub(super) fn rotated_layers(&self, layers: usize) -> Result<Vec<bool>> {
        let field = "no_rope_layers";
        let Some(given) = self.get(field) else {
            let every = self.size("no_rope_layer_interval")?.unwrap_or(4);
            return Ok((1..=layers).map(|nth| !nth.is_multiple_of(every)).collect());
        };
        let given = given.as_array().filter(|given| given.len() >= layers);
        let read = given.and_then(|given| {
            given.iter().take(layers).map(|v| v.as_bool().or_else(|| v.as_u64().map(|n| n != 0))).collect()
        });
        read.ok_or_else(|| self.wrong(field, "a list with a 0 or 1 for each layer"))
    }

    /// Which layers `layer_types` gives a window.
    fn layer_types(&self, num_hidden_layers: usize) -> Result<Option<Vec<bool>>> {
        let field = "layer_types";
        let Some(types) = self.get(field) else { return Ok(None) };
        let types = types.as_array().filter(|types| types.len() == num_hidden_layers);
        let types = types.ok_or_else(|| self.wrong(field, "a list with one entry per layer"))?;
        let slides = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => Err(self.wrong(field, "a list of full_attention and sliding_attention")),
        };
        types.iter().map(slides).collect::<Result<_>>().map(Some)
    }
}
