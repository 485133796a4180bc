//! The text of a plan, as people write it on a command line. In: text and the model's configuration; out: a plan.

use super::Plan;
use crate::{Error, LayerCache, ModelConfig, Result};

impl Plan {
    /// Reads a plan:
    ///
    /// - `keep`;
    /// - flags, one per layer: `1, 0, 0, 1` (1: one K/V head; 0: unchanged);
    /// - `mqa:LAYERS` and `gqaN:LAYERS` joined by `;`, later ones override, where `LAYERS` is `all`, `firstN`, `lastN`,
    ///   `alternateN` (the last layer, the last but two, ...; N of them) or a list such as `0,3-7,29`.
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
        let mut heads = config.num_key_value_heads.clone();
        for part in trimmed.split(';').map(str::trim) {
            let (own, layers) = parse_part(part, trimmed, heads.len())?;
            for layer in layers {
                heads[layer] = own;
            }
        }
        Self::from_heads(&heads, config)
    }

    /// The text of the plan, which [`Self::parse`] reads back: `keep`, or parts such as `mqa:0,3-7` joined by `; `, ascending
    /// by the bytes of what the layers cache.
    #[must_use]
    pub fn describe(&self) -> String {
        let changed = self.changed_layers();
        let mut caches: Vec<_> = changed.iter().map(|&idx| self.layers[idx]).collect();
        caches.sort_by_cached_key(|cache| (cache.bytes_per_token(1, 1), cache.to_string()));
        caches.dedup();
        let part = |cache: &LayerCache| {
            let layers = changed.iter().copied().filter(|&idx| self.layers[idx] == *cache);
            format!("{cache}:{}", ranges(layers))
        };
        let parts: Vec<_> = caches.iter().map(part).collect();
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

/// One `mqa:LAYERS` or `gqaN:LAYERS`: the count and the layers.
fn parse_part(part: &str, text: &str, num_hidden_layers: usize) -> Result<(usize, Vec<usize>)> {
    let wrong = |detail: String| Error::PlanSyntax { text: shorten(text), detail };
    let usage = "a plan is 'keep', a flag per layer ('1, 0, ...'), a .json or .yaml file, or parts such as 'mqa:last8' and 'gqa2:0,3-7' joined by ';'";
    let (kind, layers) = part.split_once(':').ok_or_else(|| wrong(format!("'{part}' is not understood; {usage}")))?;
    let kind = kind.trim();
    let heads = match kind.strip_prefix("gqa") {
        Some(count) => number(count).filter(|n| *n > 0),
        None => (kind == "mqa").then_some(1),
    };
    let heads = heads.ok_or_else(|| wrong(format!("'{kind}' is neither 'mqa' nor 'gqaN' with N from 1; {usage}")))?;
    let layers = parse_layers(layers.trim(), num_hidden_layers).map_err(|problem| match problem {
        LayersProblem::Syntax(detail) => wrong(detail),
        LayersProblem::Range(layer) => Error::PlanLayer { layer, last: num_hidden_layers - 1 },
    })?;
    Ok((heads, layers))
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
