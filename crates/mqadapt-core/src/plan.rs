//! How many K/V heads each layer gets. In: text and the model's configuration; out: a choice per layer that is legal.

use std::fmt;

use serde_json::Value;

use crate::{Error, ModelConfig, Result};

/// What one layer caches. Other kinds of K/V compression than a head count will join.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KvChoice {
    /// This many K/V heads of the source's `head_dim`.
    Heads(usize),
}

impl KvChoice {
    /// Its number of K/V heads.
    #[must_use]
    pub fn num_key_value_heads(self) -> usize {
        match self {
            Self::Heads(heads) => heads,
        }
    }
}

/// One choice per layer, legal for the model it was built for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Plan {
    layers: Vec<KvChoice>,
    source: Vec<usize>,
}

impl Plan {
    /// The plan that changes nothing.
    #[must_use]
    pub fn keep(config: &ModelConfig) -> Self {
        let source = config.num_key_value_heads.clone();
        Self { layers: source.iter().map(|&heads| KvChoice::Heads(heads)).collect(), source }
    }

    /// A plan from one K/V-head count per layer.
    ///
    /// # Errors
    /// [`Error::PlanLength`], or [`Error::PlanHeads`] for a count that does not divide the layer's.
    pub fn from_heads(heads: &[usize], config: &ModelConfig) -> Result<Self> {
        let source = config.num_key_value_heads.clone();
        if heads.len() != source.len() {
            return Err(Error::PlanLength { expected: source.len(), found: heads.len() });
        }
        for (layer, (&own, &source_heads)) in heads.iter().zip(&source).enumerate() {
            if own == 0 || !source_heads.is_multiple_of(own) {
                return Err(Error::PlanHeads {
                    layer,
                    found: own,
                    source_heads,
                    legal: in_words(&legal_counts(source_heads)),
                });
            }
        }
        Ok(Self { layers: heads.iter().map(|&own| KvChoice::Heads(own)).collect(), source })
    }

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

    /// Reads the content of a plan file, JSON or YAML: `{"num_key_value_heads": [3, 3, 1, ...]}`.
    ///
    /// # Errors
    /// [`Error::Syntax`], and those of [`Self::from_heads`].
    pub fn from_document(text: &str, config: &ModelConfig) -> Result<Self> {
        let wrong = |detail: String| Error::Syntax { what: "plan", detail };
        // JSON is tried first: its messages are better, and only a subset of YAML would be left to check
        let document: Value = if text.trim_start().starts_with('{') {
            serde_json::from_str(text).map_err(|e| wrong(e.to_string()))?
        } else {
            serde_yaml_ng::from_str(text).map_err(|e| wrong(e.to_string()))?
        };
        let expected = "expected {\"num_key_value_heads\": [one whole number per layer]}";
        let fields = document.as_object().ok_or_else(|| wrong(expected.to_owned()))?;
        if let Some(unknown) = fields.keys().find(|key| *key != "num_key_value_heads") {
            return Err(wrong(format!("unknown field '{unknown}'; {expected}")));
        }
        let entries =
            fields.get("num_key_value_heads").and_then(Value::as_array).ok_or_else(|| wrong(expected.to_owned()))?;
        let heads: Option<Vec<_>> = entries.iter().map(|n| n.as_u64().and_then(|n| usize::try_from(n).ok())).collect();
        Self::from_heads(&heads.ok_or_else(|| wrong(expected.to_owned()))?, config)
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

    /// The choice of each layer.
    #[must_use]
    pub fn layers(&self) -> &[KvChoice] {
        &self.layers
    }

    /// K/V heads of each layer.
    #[must_use]
    pub fn num_key_value_heads(&self) -> Vec<usize> {
        self.layers.iter().map(|choice| choice.num_key_value_heads()).collect()
    }

    /// K/V heads of each layer of the model that the plan was built for.
    #[must_use]
    pub fn source_num_key_value_heads(&self) -> &[usize] {
        &self.source
    }

    /// Whether the plan changes this layer.
    #[must_use]
    pub fn changes(&self, layer_idx: usize) -> bool {
        let source = self.source.get(layer_idx).map(|&heads| KvChoice::Heads(heads));
        self.layers.get(layer_idx).copied() != source
    }

    /// The layers that the plan changes, ascending.
    #[must_use]
    pub fn changed_layers(&self) -> Vec<usize> {
        (0..self.layers.len()).filter(|&idx| self.changes(idx)).collect()
    }

    /// Whether it changes nothing.
    #[must_use]
    pub fn is_keep(&self) -> bool {
        self.changed_layers().is_empty()
    }
}

/// The canonical file form.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{{\"num_key_value_heads\": {:?}}}", self.num_key_value_heads())
    }
}

/// The K/V-head counts that a layer with `source_heads` can be merged to, ascending: its divisors.
#[must_use]
pub(crate) fn legal_counts(source_heads: usize) -> Vec<usize> {
    (1..=source_heads).filter(|n| source_heads.is_multiple_of(*n)).collect()
}

fn in_words(counts: &[usize]) -> String {
    let words: Vec<_> = counts.iter().map(ToString::to_string).collect();
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} and {last}", rest.join(", ")),
        _ => words.concat(),
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

#[cfg(test)]
mod tests;
