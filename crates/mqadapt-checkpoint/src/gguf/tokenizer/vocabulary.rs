//! Tokens of a GGUF file: their texts, what kind each is, and the ids that have a name.

use std::collections::HashMap;

use serde::Serializer;

use crate::gguf::described::token_id;
use crate::gguf::metadata::Metadata;
use crate::gguf::problem::{Parsed, Problem};

/// `tokenizer.ggml.token_type` (`llama.h`, `enum llama_token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenType {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Unused,
    Byte,
}

pub(super) struct Vocabulary<'a> {
    texts: &'a [String],
    types: Vec<TokenType>,
}

impl<'a> Vocabulary<'a> {
    pub(super) fn read(metadata: &'a Metadata) -> Parsed<Self> {
        let key = "tokenizer.ggml.tokens";
        let texts = metadata.texts(key)?.ok_or_else(|| Problem::missing_key(key))?;
        let mut seen = HashMap::new();
        for (id, text) in texts.iter().enumerate() {
            if let Some(other) = seen.insert(text.as_str(), id).filter(|_| !text.is_empty()) {
                return Err(Problem::key(key, format!("has '{}' twice, as {other} and {id}", text.escape_debug())));
            }
        }
        Ok(Self { texts, types: token_types(metadata, texts.len())? })
    }

    pub(super) fn len(&self) -> usize {
        self.texts.len()
    }

    pub(super) fn text(&self, id: usize) -> Option<&'a str> {
        self.texts.get(id).map(String::as_str)
    }

    /// Every token: id, text, type.
    pub(super) fn tokens(&self) -> impl Iterator<Item = (usize, &'a str, TokenType)> {
        self.texts.iter().zip(&self.types).enumerate().map(|(id, (text, ty))| (id, text.as_str(), *ty))
    }

    /// Tokens that are found in a text before anything else is done to it: id, text, whether it is special (left out
    /// when ids are turned into plain text).
    pub(super) fn added(&self, special: &SpecialTokens) -> impl Iterator<Item = (usize, &'a str, bool)> {
        let named = [special.bos, special.eos, special.pad, special.unk];
        self.tokens().filter(|(_, text, _)| !text.is_empty()).filter_map(move |(id, text, ty)| match ty {
            TokenType::Control | TokenType::Unknown => Some((id, text, true)),
            _ if named.contains(&Some(id)) => Some((id, text, true)),
            TokenType::UserDefined => Some((id, text, false)),
            _ => None,
        })
    }

    /// Writes text to id for the model, without the tokens that only fill up the embedding.
    pub(super) fn serialize_ids<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let ids = self.tokens().filter(|(_, text, ty)| !is_filler(text, *ty));
        serializer.collect_map(ids.map(|(id, text, _)| (text, id)))
    }

    /// The id that the metadata gives a name, checked.
    pub(super) fn special_id(&self, metadata: &Metadata, name: &str) -> Parsed<Option<usize>> {
        let Some(id) = token_id(metadata, name)? else { return Ok(None) };
        let inside = usize::try_from(id).ok().filter(|&id| id < self.len());
        inside.map(Some).ok_or_else(|| {
            let key = format!("tokenizer.ggml.{name}_token_id");
            Problem::key(&key, format!("is {id}, but the vocabulary has {} tokens", self.len()))
        })
    }
}

/// llama.cpp's converter fills ids that the original tokenizer does not have with unused `[PAD123]`.
fn is_filler(text: &str, ty: TokenType) -> bool {
    text.is_empty() || ty == TokenType::Unused && text.starts_with("[PAD")
}

fn token_types(metadata: &Metadata, count: usize) -> Parsed<Vec<TokenType>> {
    let key = "tokenizer.ggml.token_type";
    let Some(numbers) = metadata.integers(key)? else { return Ok(vec![TokenType::Normal; count]) };
    if numbers.len() != count {
        return Err(Problem::key(key, format!("has {} entries for {count} tokens", numbers.len())));
    }
    let known = |number: &u64| match number {
        0 | 1 => Ok(TokenType::Normal),
        2 => Ok(TokenType::Unknown),
        3 => Ok(TokenType::Control),
        4 => Ok(TokenType::UserDefined),
        5 => Ok(TokenType::Unused),
        6 => Ok(TokenType::Byte),
        _ => Err(Problem::key(key, format!("has the unknown type {number}"))),
    };
    numbers.iter().map(known).collect()
}

/// The tokens that transformers knows by name.
pub(super) struct SpecialTokens {
    pub bos: Option<usize>,
    pub eos: Option<usize>,
    pub pad: Option<usize>,
    pub unk: Option<usize>,
}

impl SpecialTokens {
    /// A `SentencePiece` file may leave out the ids that every such model of a Llama has: 0, 1, 2.
    pub(super) fn read(metadata: &Metadata, vocabulary: &Vocabulary, kind: &str) -> Parsed<Self> {
        let usual = |id: usize| Some(id).filter(|&id| kind == "llama" && id < vocabulary.len());
        Ok(Self {
            bos: vocabulary.special_id(metadata, "bos")?.or(usual(1)),
            eos: vocabulary.special_id(metadata, "eos")?.or(usual(2)),
            pad: vocabulary.special_id(metadata, "padding")?,
            unk: vocabulary.special_id(metadata, "unknown")?.or(usual(0)),
        })
    }
}
