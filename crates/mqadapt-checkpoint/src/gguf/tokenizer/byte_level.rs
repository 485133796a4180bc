//! Byte-level BPE, `tokenizer.ggml.model = gpt2`.

use std::collections::HashSet;

use serde_json::json;

use super::vocabulary::Vocabulary;
use super::{Bpe, Pipeline, pre_tokenizer};
use crate::gguf::metadata::Metadata;
use crate::gguf::problem::{Parsed, Problem};

pub(super) fn pipeline<'a>(metadata: &'a Metadata, vocabulary: &'a Vocabulary<'a>) -> Parsed<Pipeline<'a>> {
    let pre = pre_tokenizer::of(metadata)?;
    Ok(Pipeline {
        normalizer: pre.normalizer(),
        pre_tokenizer: pre.json(),
        decoder: json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true }),
        model: Bpe { ignore_merges: pre.ignore_merges, ..Bpe::new(vocabulary, merges(metadata, vocabulary)?) },
        adds_bos: pre.adds_bos,
        normalized_tokens: false,
    })
}

/// Pairs in the order of their ranks; each pair and what it makes must be tokens, or the tokenizer would not load.
fn merges<'a>(metadata: &'a Metadata, vocabulary: &Vocabulary) -> Parsed<Vec<(&'a str, &'a str)>> {
    let key = "tokenizer.ggml.merges";
    let merges = metadata.texts(key)?.ok_or_else(|| Problem::missing_key(key))?;
    let known: HashSet<&str> = vocabulary.tokens().map(|(_, text, _)| text).collect();
    let mut joined = String::new();
    let mut pairs = Vec::with_capacity(merges.len());
    for merge in merges {
        let wrong = |detail: &str| Problem::key(key, format!("has '{}', {detail}", merge.escape_debug()));
        let (left, right) = merge.split_once(' ').ok_or_else(|| wrong("which is not two tokens and a space"))?;
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        if ![left, right, joined.as_str()].iter().all(|text| known.contains(text)) {
            return Err(wrong("which joins or makes something that is not a token"));
        }
        pairs.push((left, right));
    }
    Ok(pairs)
}
