//! `SentencePiece` BPE with byte fallback, `tokenizer.ggml.model = llama`.
//!
//! `SentencePiece` merges the pair whose result has the highest score; `tokenizers` merges by rank. Ranking every pair of
//! tokens that makes a token by that token's score gives the same ids (transformers' `generate_merges` in
//! `convert_slow_tokenizer.py`).

use std::cmp::Ordering;
use std::collections::HashMap;

use serde_json::{Value, json};

use super::vocabulary::{SpecialTokens, TokenType, Vocabulary};
use super::{Bpe, Pipeline};
use crate::gguf::metadata::Metadata;
use crate::gguf::problem::{Parsed, Problem};

/// `SentencePiece`'s space.
const SPACE: &str = "\u{2581}";
/// Longest token, in bytes, that merges are looked for in; bounds the work that a hostile vocabulary causes.
const LONGEST_TOKEN: usize = 1024;

pub(super) fn pipeline<'a>(
    metadata: &Metadata,
    vocabulary: &'a Vocabulary<'a>,
    special: &SpecialTokens,
) -> Parsed<Pipeline<'a>> {
    let add_prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let replace = |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let prepend = add_prefix.then(|| json!({ "type": "Prepend", "prepend": SPACE }));
    let normalizers: Vec<_> = prepend.into_iter().chain([replace(" ", SPACE)]).collect();
    let strip = add_prefix.then(|| json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    let decoders = [replace(SPACE, " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    let decoders: Vec<_> = decoders.into_iter().chain(strip).collect();
    let byte_fallback = vocabulary.tokens().any(|(_, _, ty)| ty == TokenType::Byte);
    Ok(Pipeline {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        pre_tokenizer: Value::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        model: Bpe {
            unk_token: special.unk.and_then(|id| vocabulary.text(id)),
            fuse_unk: true,
            byte_fallback,
            ..Bpe::new(vocabulary, merges(metadata, vocabulary)?)
        },
        adds_bos: true,
        // `SentencePiece` looks for them after it has replaced spaces, where a run of spaces is a token too (Gemma). A
        // prefix would be put before each of their texts as well; then llama.cpp's rule holds, as for control tokens.
        normalized_tokens: !add_prefix,
    })
}

/// A pair of tokens that makes a token.
struct Merge<'a> {
    left: &'a str,
    right: &'a str,
    /// Of what it makes.
    score: f32,
    /// Order among pairs of equal score: transformers sorts by the lengths, longest first, then keeps this order.
    ids: (usize, usize, usize),
}

fn merges<'a>(metadata: &Metadata, vocabulary: &Vocabulary<'a>) -> Parsed<Vec<(&'a str, &'a str)>> {
    let key = "tokenizer.ggml.scores";
    let scores = metadata.floats(key)?.ok_or_else(|| Problem::missing_key(key))?;
    if scores.len() != vocabulary.len() {
        return Err(Problem::key(key, format!("has {} entries for {} tokens", scores.len(), vocabulary.len())));
    }
    // control tokens and the like are never the result of a merge, nor part of one
    let mergeable = |ty| matches!(ty, TokenType::Normal | TokenType::UserDefined);
    let tokens = || vocabulary.tokens().filter(|(_, text, ty)| mergeable(*ty) && text.len() <= LONGEST_TOKEN);
    let ids: HashMap<&str, usize> = tokens().map(|(id, text, _)| (text, id)).collect();
    let mut merges = Vec::new();
    for (id, text, _) in tokens() {
        let score = scores.get(id).copied().unwrap_or_default();
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(&left_id), Some(&right_id)) = (ids.get(left), ids.get(right)) {
                merges.push(Merge { left, right, score, ids: (id, left_id, right_id) });
            }
        }
    }
    merges.sort_by(by_rank);
    Ok(merges.into_iter().map(|merge| (merge.left, merge.right)).collect())
}

fn by_rank(a: &Merge, b: &Merge) -> Ordering {
    let length = |text: &str| text.chars().count();
    b.score
        .total_cmp(&a.score)
        .then_with(|| length(b.left).cmp(&length(a.left)))
        .then_with(|| length(b.right).cmp(&length(a.right)))
        .then_with(|| a.ids.cmp(&b.ids))
}
