//! The files of a tokenizer, made from the metadata of a GGUF file.
//!
//! In: token texts, types, scores and merges. Out: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and
//! `generation_config.json`, which transformers 4.57 and 5 load, and whose ids are those of the original tokenizer.

mod byte_level;
mod pre_tokenizer;
mod sentencepiece;
mod vocabulary;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::metadata::{Metadata, ModelKeys};
use super::problem::{Parsed, Problem};
use crate::SideFile;
use crate::side_files::Content;
use vocabulary::{SpecialTokens, Vocabulary};

/// The files; none but the generation configuration where the metadata has no tokenizer.
pub(super) fn side_files(keys: ModelKeys) -> Parsed<Vec<SideFile>> {
    let metadata = keys.metadata;
    let key = "tokenizer.ggml.model";
    let kind = metadata.text(key)?.unwrap_or("none");
    if matches!(kind, "none" | "no_vocab") {
        return Ok(Vec::new());
    }
    let vocabulary = Vocabulary::read(metadata)?;
    let special = SpecialTokens::read(metadata, &vocabulary, kind)?;
    let pipeline = match kind {
        "gpt2" => byte_level::pipeline(metadata, &vocabulary)?,
        "llama" => sentencepiece::pipeline(metadata, &vocabulary, &special)?,
        other => {
            let detail = format!(
                "is '{}'; supported are 'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)",
                other.escape_debug()
            );
            return Err(Problem::key(key, detail));
        }
    };
    let add = Ends::read(metadata, &special, pipeline.adds_bos)?;
    let chat_template = metadata.text("tokenizer.chat_template")?;
    let mut files = vec![
        file("generation_config.json", &generation_config(metadata, &special, &vocabulary)?)?,
        file("tokenizer.json", &tokenizer_json(&pipeline, &vocabulary, &special, add))?,
        file("tokenizer_config.json", &tokenizer_config(keys, &pipeline, &vocabulary, &special, add)?)?,
    ];
    if let Some(template) = chat_template {
        files.push(SideFile { name: "chat_template.jinja".to_owned(), content: Content::Bytes(template.into()) });
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}

fn file(name: &str, content: &impl Serialize) -> Parsed<SideFile> {
    let mut text = serde_json::to_vec_pretty(content).map_err(|e| Problem::key(name, e.to_string()))?;
    text.push(b'\n');
    Ok(SideFile { name: name.to_owned(), content: Content::Bytes(text) })
}

/// The parts of a `tokenizer.json` that differ between kinds of tokenizer.
struct Pipeline<'a> {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Bpe<'a>,
    /// Whether a beginning-of-sequence token is added where the metadata does not say.
    adds_bos: bool,
    /// Where user-defined tokens are looked for: in the text after normalisation, or in the text as it is given. Control
    /// tokens are always found in the text as it is given.
    normalized_tokens: bool,
}

/// The `model` of a `tokenizer.json`. A vocabulary of a quarter of a million tokens has half a million merges: they are written from
/// the texts of the metadata.
#[derive(Serialize)]
struct Bpe<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    dropout: Option<f32>,
    unk_token: Option<&'a str>,
    continuing_subword_prefix: Option<&'a str>,
    end_of_word_suffix: Option<&'a str>,
    fuse_unk: bool,
    byte_fallback: bool,
    ignore_merges: bool,
    #[serde(serialize_with = "Vocabulary::serialize_ids")]
    vocab: &'a Vocabulary<'a>,
    merges: Vec<(&'a str, &'a str)>,
}

impl<'a> Bpe<'a> {
    fn new(vocab: &'a Vocabulary<'a>, merges: Vec<(&'a str, &'a str)>) -> Self {
        Self {
            kind: "BPE",
            dropout: None,
            unk_token: None,
            continuing_subword_prefix: None,
            end_of_word_suffix: None,
            fuse_unk: false,
            byte_fallback: false,
            ignore_merges: false,
            vocab,
            merges,
        }
    }
}

/// A `tokenizer.json`.
#[derive(Serialize)]
struct TokenizerJson<'a> {
    version: &'static str,
    truncation: Option<Value>,
    padding: Option<Value>,
    added_tokens: Vec<Map<String, Value>>,
    normalizer: &'a Value,
    pre_tokenizer: &'a Value,
    post_processor: Value,
    decoder: &'a Value,
    model: &'a Bpe<'a>,
}

/// Which tokens are put around a text.
#[derive(Clone, Copy)]
struct Ends {
    bos: Option<usize>,
    eos: Option<usize>,
}

impl Ends {
    fn read(metadata: &Metadata, special: &SpecialTokens, adds_bos: bool) -> Parsed<Self> {
        let end = |name: &str, default: bool, id: Option<usize>| {
            let key = format!("tokenizer.ggml.add_{name}_token");
            match metadata.flag(&key)? {
                Some(true) if id.is_none() => Err(Problem::key(&key, "is true, but the file names no such token")),
                flag => Ok(id.filter(|_| flag.unwrap_or(default))),
            }
        };
        Ok(Self { bos: end("bos", adds_bos, special.bos)?, eos: end("eos", false, special.eos)? })
    }
}

fn tokenizer_json<'a>(
    pipeline: &'a Pipeline,
    vocabulary: &Vocabulary,
    special: &SpecialTokens,
    add: Ends,
) -> TokenizerJson<'a> {
    let added = added_tokens(pipeline, vocabulary, special).map(|(id, mut token)| {
        token.insert("id".to_owned(), json!(id));
        token
    });
    TokenizerJson {
        version: "1.0",
        truncation: None,
        padding: None,
        added_tokens: added.collect(),
        normalizer: &pipeline.normalizer,
        pre_tokenizer: &pipeline.pre_tokenizer,
        post_processor: post_processor(vocabulary, add),
        decoder: &pipeline.decoder,
        model: &pipeline.model,
    }
}

/// Ids of the tokens that are found in a text before it is cut into words, and what `tokenizers` wants to know of each.
fn added_tokens(
    pipeline: &Pipeline,
    vocabulary: &Vocabulary,
    special: &SpecialTokens,
) -> impl Iterator<Item = (usize, Map<String, Value>)> {
    let normalized = pipeline.normalized_tokens;
    vocabulary.added(special).map(move |(id, text, is_special)| {
        let fields = [
            ("single_word", false),
            ("lstrip", false),
            ("rstrip", false),
            ("normalized", normalized && !is_special),
            ("special", is_special),
        ];
        let mut token = Map::new();
        token.insert("content".to_owned(), json!(text));
        token.extend(fields.map(|(name, flag)| (name.to_owned(), Value::Bool(flag))));
        (id, token)
    })
}

/// A template with the tokens at the ends of each sequence; `null` where there are none.
fn post_processor(vocabulary: &Vocabulary, add: Ends) -> Value {
    if add.bos.is_none() && add.eos.is_none() {
        return Value::Null;
    }
    let text = |id: Option<usize>| id.and_then(|id| vocabulary.text(id));
    let sequence = |name: &str, type_id: u8| {
        let end = |id| text(id).map(|text| json!({ "SpecialToken": { "id": text, "type_id": type_id } }));
        let middle = json!({ "Sequence": { "id": name, "type_id": type_id } });
        [end(add.bos), Some(middle), end(add.eos)].into_iter().flatten()
    };
    let tokens: Map<_, _> = [add.bos, add.eos]
        .into_iter()
        .filter_map(|id| Some((text(id)?.to_owned(), json!({ "id": text(id)?, "ids": [id?], "tokens": [text(id)?] }))))
        .collect();
    json!({
        "type": "TemplateProcessing",
        "single": sequence("A", 0).collect::<Vec<_>>(),
        "pair": sequence("A", 0).chain(sequence("B", 1)).collect::<Vec<_>>(),
        "special_tokens": tokens,
    })
}

fn tokenizer_config(
    keys: ModelKeys,
    pipeline: &Pipeline,
    vocabulary: &Vocabulary,
    special: &SpecialTokens,
    add: Ends,
) -> Parsed<Value> {
    let decoder: Map<_, _> =
        added_tokens(pipeline, vocabulary, special).map(|(id, token)| (id.to_string(), Value::Object(token))).collect();
    let mut out = Map::new();
    out.insert("add_bos_token".to_owned(), json!(add.bos.is_some()));
    out.insert("add_eos_token".to_owned(), json!(add.eos.is_some()));
    out.insert("added_tokens_decoder".to_owned(), Value::Object(decoder));
    let named = [
        ("bos_token", special.bos),
        ("eos_token", special.eos),
        ("pad_token", special.pad),
        ("unk_token", special.unk),
    ];
    for (name, id) in named {
        out.extend(id.and_then(|id| vocabulary.text(id)).map(|text| (name.to_owned(), json!(text))));
    }
    // transformers reads chat_template.jinja beside this file; versions before 4.43 read it here
    out.extend(keys.metadata.text("tokenizer.chat_template")?.map(|text| ("chat_template".to_owned(), json!(text))));
    out.insert("clean_up_tokenization_spaces".to_owned(), json!(false));
    out.extend(keys.integer("context_length")?.map(|n| ("model_max_length".to_owned(), json!(n))));
    out.insert("tokenizer_class".to_owned(), json!("PreTrainedTokenizerFast"));
    Ok(Value::Object(out))
}

/// Generation stops at any of the tokens that end a text, a turn or a message.
fn generation_config(metadata: &Metadata, special: &SpecialTokens, vocabulary: &Vocabulary) -> Parsed<Value> {
    let mut ends: Vec<usize> = special.eos.into_iter().collect();
    for name in ["eot", "eom"] {
        ends.extend(vocabulary.special_id(metadata, name)?.filter(|id| !ends.contains(id)).as_slice());
    }
    let ends = match ends.as_slice() {
        [] => Value::Null,
        [only] => json!(only),
        several => json!(several),
    };
    let fields = [("bos_token_id", json!(special.bos)), ("eos_token_id", ends), ("pad_token_id", json!(special.pad))];
    Ok(fields.into_iter().filter(|(_, id)| !id.is_null()).map(|(name, id)| (name.to_owned(), id)).collect())
}

#[cfg(test)]
mod tests;
