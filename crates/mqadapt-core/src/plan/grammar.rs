//! The text of a plan, as people write it on a command line. In: text and the model's configuration; out: a plan.

use super::Plan;
use crate::{CacheStorage, Error, LayerCache, ModelConfig, Result};

impl Plan {
    /// Reads a plan:
    ///
    /// - `keep`;
    /// - flags, one per layer: `1, 0, 0, 1` (1: one K/V head; 0: unchanged);
    /// - `mqa:LAYERS`, `gqaN:LAYERS` and `keep:LAYERS` joined by `;`, later ones override, where `LAYERS` is `all`, `firstN`,
    ///   `lastN`, `alternateN` (the last layer, the last but two, ...; N of them) or a list such as `0,3-7,29`. Behind each
    ///   name may stand how the cache is stored: `@int8`, `@int4`.
    ///
    /// # Errors
    /// [`Error::PlanSyntax`], [`Error::PlanLayer`], and those of [`Self::from_heads`].
    pub fn parse(text: &str, config: &ModelConfig) -> Result<Self> {
        let trimmed = text.trim();
        if trimmed == "keep" {
            return Ok(Self::keep(config));
        }
        if trimmed.starts_with(['0', '1']) {
            return Self::parse_flags(trimmed, config);
        }
        let keep = Self::keep(config);
        let mut caches = keep.layers.clone();
        for part in trimmed.split(';').map(str::trim) {
            let Part { heads, storage, layers } = parse_part(part, trimmed, caches.len())?;
            for layer in layers {
                caches[layer] = heads.map_or(keep.layers[layer], LayerCache::heads).stored(storage);
            }
        }
        Self::from_layers(&caches, &keep.layers)
    }

    /// The text of the plan, which [`Self::parse`] reads back: `keep`, or parts such as `mqa:0,3-7` joined by `; `, ascending
    /// by the bytes of what the layers cache.
    #[must_use]
    pub fn describe(&self) -> String {
        let named = |idx: usize| {
            let cache = self.layers[idx];
            match cache.storage {
                _ if self.changes(idx) => Some((cache.bytes_per_token(64, 2), cache.to_string())),
                CacheStorage::AsComputed => None,
                // K/V heads of kept layers differ, so these stand behind all others
                storage => Some((u64::MAX, format!("keep@{}", storage.name()))),
            }
        };
        let mut names: Vec<_> = (0..self.layers.len()).filter_map(named).collect();
        names.sort();
        names.dedup();
        let part = |name: &(u64, String)| {
            let layers = (0..self.layers.len()).filter(|&idx| named(idx).as_ref() == Some(name));
            format!("{}:{}", name.1, ranges(layers))
        };
        let parts: Vec<_> = names.iter().map(part).collect();
        if parts.is_empty() { "keep".to_owned() } else { parts.join("; ") }
    }

    fn parse_flags(text: &str, config: &ModelConfig) -> Result<Self> {
        let flags: Vec<_> = text.split(',').map(str::trim).collect();
        if let Some(odd) = flags.iter().find(|flag| !matches!(**flag, "0" | "1")) {
            let detail =
                format!("'{odd}' is not a flag; a flag list has 1 (one K/V head) or 0 (unchanged) for each layer");
            return Err(Error::PlanSyntax { text: shorten(text), detail });
        }
        let source = &config.num_key_value_heads;
        if flags.len() != source.len() {
            return Err(Error::PlanLength { expected: source.len(), found: flags.len() });
        }
        let heads: Vec<_> = flags.iter().zip(source).map(|(flag, &own)| if *flag == "1" { 1 } else { own }).collect();
        Self::from_heads(&heads, config)
    }
}

/// One part of a plan, such as `mqa@int4:LAYERS`.
struct Part {
    /// `None`: those of the source.
    heads: Option<usize>,
    storage: CacheStorage,
    layers: Vec<usize>,
}

fn parse_part(part: &str, text: &str, num_hidden_layers: usize) -> Result<Part> {
    let wrong = |detail: String| Error::PlanSyntax { text: shorten(text), detail };
    let usage = "a plan is 'keep', a flag per layer ('1, 0, ...'), a .json or .yaml file, or parts such as 'mqa:last8', 'gqa2:0,3-7' and 'keep@int4:all' joined by ';'";
    let (kind, layers) = part.split_once(':').ok_or_else(|| wrong(format!("'{part}' is not understood; {usage}")))?;
    let (form, storage) = match kind.split_once('@') {
        Some((form, storage)) => (form.trim(), Some(storage.trim())),
        None => (kind.trim(), None),
    };
    let heads = match (form, form.strip_prefix("gqa")) {
        ("keep", _) => Some(None),
        ("mqa", _) => Some(Some(1)),
        (_, Some(count)) => number(count).filter(|n| *n > 0).map(Some),
        _ => None,
    };
    let heads =
        heads.ok_or_else(|| wrong(format!("'{form}' is neither 'keep', 'mqa' nor 'gqaN' with N from 1; {usage}")))?;
    let storage = match storage {
        None => CacheStorage::AsComputed,
        Some(name) => CacheStorage::parse(name)
            .filter(|storage| *storage != CacheStorage::AsComputed)
            .ok_or_else(|| wrong(format!("'@{name}' is no way to store a K/V cache; '@int8' and '@int4' are")))?,
    };
    let layers = parse_layers(layers.trim(), num_hidden_layers).map_err(|problem| match problem {
        LayersProblem::Syntax(detail) => wrong(detail),
        LayersProblem::Range(layer) => Error::PlanLayer { layer, last: num_hidden_layers - 1 },
    })?;
    Ok(Part { heads, storage, layers })
}

enum LayersProblem {
    Syntax(String),
    Range(usize),
}

fn parse_layers(text: &str, num_hidden_layers: usize) -> std::result::Result<Vec<usize>, LayersProblem> {
    if text == "all" {
        return Ok((0..num_hidden_layers).collect());
    }
    let syntax = |detail: String| LayersProblem::Syntax(detail);
    for (word, most) in
        [("first", num_hidden_layers), ("last", num_hidden_layers), ("alternate", num_hidden_layers.div_ceil(2))]
    {
        let Some(count) = text.strip_prefix(word) else { continue };
        let count = number(count).filter(|n| (1..=most).contains(n));
        let count = count.ok_or_else(|| {
            syntax(format!("'{text}': {word}N takes N from 1 to {most} for {num_hidden_layers} layers"))
        })?;
        return Ok(match word {
            "first" => (0..count).collect(),
            "last" => (num_hidden_layers - count..num_hidden_layers).collect(),
            _ => (0..count).rev().map(|i| num_hidden_layers - 1 - 2 * i).collect(),
        });
    }
    let mut layers = Vec::new();
    for item in text.split(',').map(str::trim) {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let (Some(first), Some(last)) = (number(first.trim()), number(last.trim())) else {
            return Err(syntax(format!(
                "'{item}' is not a layer; layers are 'all', 'firstN', 'lastN', 'alternateN' or a list such as '0,3-7,29'"
            )));
        };
        if first > last {
            return Err(syntax(format!("'{item}' runs backwards")));
        }
        if last >= num_hidden_layers {
            return Err(LayersProblem::Range(last));
        }
        layers.extend(first..=last);
    }
    Ok(layers)
}

/// Ascending layers as `0,3-7`.
fn ranges(layers: impl Iterator<Item = usize>) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for layer in layers {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == layer => *last = layer,
            _ => ranges.push((layer, layer)),
        }
    }
    let spelled = |&(first, last): &(usize, usize)| {
        if first == last { first.to_string() } else { format!("{first}-{last}") }
    };
    ranges.iter().map(spelled).collect::<Vec<_>>().join(",")
}

/// A whole number in plain digits.
fn number(text: &str) -> Option<usize> {
    text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse().ok())?
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}
