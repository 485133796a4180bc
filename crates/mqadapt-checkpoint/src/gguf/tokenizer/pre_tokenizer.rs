//! How text is cut into words before merges: the name in `tokenizer.ggml.pre`, and what it stands for.
//!
//! A GGUF file says only the name; llama.cpp's `llama-vocab.cpp` has the list of names. Each is written here as the
//! `pre_tokenizer` of the original model's `tokenizer.json`.

use serde_json::{Value, json};

use crate::gguf::metadata::Metadata;
use crate::gguf::problem::{Parsed, Problem};

/// What a name stands for.
#[derive(Debug, Clone, Copy)]
pub(super) struct PreTokenizer {
    steps: &'static [Step],
    nfc: bool,
    /// A word that is a token stays whole, whatever the merges would make of it.
    pub ignore_merges: bool,
    /// Whether the beginning-of-sequence token is added where the metadata does not say.
    pub adds_bos: bool,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// Every digit of any script by itself.
    Digits,
    /// Cut out whatever matches.
    Split(&'static str),
    /// GPT-2's own expression, in `ByteLevel` itself.
    Gpt2,
}

/// GPT-2's expression, for sequences in which it is not the last step.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";
/// Escaped, because many of these characters have a normal form that is another character.
const DEEPSEEK_LETTERS: &str = "\\s?[\
    A-Za-z\u{b5}\u{c0}-\u{d6}\u{d8}-\u{f6}\u{f8}-\u{1ba}\u{1bc}-\u{1bf}\u{1c4}-\u{293}\u{295}-\u{2af}\
    \u{370}-\u{373}\u{376}\u{377}\u{37b}-\u{37d}\u{37f}\u{386}\u{388}-\u{38a}\u{38c}\u{38e}-\u{3a1}\
    \u{3a3}-\u{3f5}\u{3f7}-\u{481}\u{48a}-\u{52f}\u{531}-\u{556}\u{10a0}-\u{10c5}\u{13a0}-\u{13f5}\
    \u{13f8}-\u{13fd}\u{1c90}-\u{1cba}\u{1cbd}-\u{1cbf}\u{1d00}-\u{1d2b}\u{1d6b}-\u{1d77}\u{1d79}-\u{1d9a}\
    \u{1e00}-\u{1f15}\u{1f18}-\u{1f1d}\u{1f20}-\u{1f45}\u{1f48}-\u{1f4d}\u{1f50}-\u{1f57}\u{1f59}\u{1f5b}\
    \u{1f5d}\u{1f5f}-\u{1f7d}\u{1f80}-\u{1fb4}\u{1fb6}-\u{1fbc}\u{1fbe}\u{1fc2}-\u{1fc4}\u{1fc6}-\u{1fcc}\
    \u{1fd0}-\u{1fd3}\u{1fd6}-\u{1fdb}\u{1fe0}-\u{1fec}\u{1ff2}-\u{1ff4}\u{1ff6}-\u{1ffc}\u{2102}\u{2107}\
    \u{210a}-\u{2113}\u{2115}\u{2119}-\u{211d}\u{2124}\u{2126}\u{2128}\u{212a}-\u{212d}\u{212f}-\u{2134}\u{2139}\
    \u{213c}-\u{213f}\u{2145}-\u{2149}\u{214e}\u{2183}\u{2184}\u{2c00}-\u{2c7b}\u{2c7e}-\u{2ce4}\
    \u{2ceb}-\u{2cee}\u{2cf2}\u{2cf3}\u{a640}-\u{a66d}\u{a680}-\u{a69b}\u{a722}-\u{a76f}\u{a771}-\u{a787}\
    \u{a78b}-\u{a78e}\u{ab70}-\u{abbf}\u{fb00}-\u{fb06}\u{fb13}-\u{fb17}\u{ff21}-\u{ff3a}\u{ff41}-\u{ff5a}\
    \u{10400}-\u{1044f}\u{104b0}-\u{104d3}\u{104d8}-\u{104fb}\u{10c80}-\u{10cb2}\u{10cc0}-\u{10cf2}\
    \u{118a0}-\u{118df}\u{1e900}-\u{1e943}\
    ]+";
const DEEPSEEK_CJK: &str = "[\u{4e00}-\u{9fa5}\u{800}-\u{4e00}\u{ac00}-\u{d7ff}]+";
const DEEPSEEK_V3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;

const fn steps(steps: &'static [Step]) -> PreTokenizer {
    PreTokenizer { steps, nfc: false, ignore_merges: false, adds_bos: false }
}

const fn nfc(pre: PreTokenizer) -> PreTokenizer {
    PreTokenizer { nfc: true, ..pre }
}

const fn whole_words(pre: PreTokenizer) -> PreTokenizer {
    PreTokenizer { ignore_merges: true, ..pre }
}

const fn with_bos(pre: PreTokenizer) -> PreTokenizer {
    PreTokenizer { adds_bos: true, ..pre }
}

use Step::{Digits, Gpt2, Split};

/// Names and what they stand for.
const NAMES: &[(&[&str], PreTokenizer)] = &[
    (&["smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b"], steps(&[Digits, Gpt2])),
    (&["command-r"], nfc(steps(&[Digits, Gpt2]))),
    (
        &["gpt-2", "phi-2", "jais", "trillion", "gigachat", "a.x-4.0", "mellum", "exaone4", "granite-docling"],
        steps(&[Gpt2]),
    ),
    (&["olmo", "mpt"], nfc(steps(&[Gpt2]))),
    (
        &["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"],
        with_bos(whole_words(steps(&[Split(LLAMA3)]))),
    ),
    (&["smaug-bpe", "dbrx", "glm4", "chatglm-bpe"], steps(&[Split(LLAMA3)])),
    (&["qwen2", "deepseek-r1-qwen", "megrez"], nfc(steps(&[Split(QWEN2)]))),
    (&["stablelm2", "kormo", "hunyuan", "solar-open", "grok-2"], steps(&[Split(QWEN2)])),
    (&["seed-coder"], steps(&[Split(SEED_CODER)])),
    (&["tekken"], with_bos(whole_words(steps(&[Split(TEKKEN)])))),
    (&["gpt-4o", "llama4", "kanana2"], steps(&[Split(GPT4O)])),
    (
        &["deepseek-llm"],
        steps(&[
            Split("[\r\n]"),
            Split(DEEPSEEK_LETTERS),
            Split("\\s?[!-/:-~\u{ff01}-\u{ff0f}\u{ff1a}-\u{ff5e}\u{2018}-\u{201f}\u{3000}-\u{3002}]+"),
            Split(r"\s+$"),
            Split(DEEPSEEK_CJK),
            Digits,
        ]),
    ),
    (
        &["deepseek-coder"],
        steps(&[Split("[\r\n]"), Split(r"\s?\p{L}+"), Split(r"\s?\p{P}+"), Split(DEEPSEEK_CJK), Digits]),
    ),
    (
        &["deepseek-v3", "hunyuan-dense", "joyai-llm"],
        steps(&[
            Split(r"\p{N}{1,3}"),
            Split("[\u{4e00}-\u{9fa5}\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+"),
            Split(DEEPSEEK_V3),
        ]),
    ),
    (&["bloom", "poro-chat", "gpt3-finnish"], steps(&[Split(BLOOM)])),
    (&["viking"], steps(&[Split(BLOOM), Digits])),
    // what llama.cpp does for models whose own pre-tokenizer nobody looked up
    (&["default"], steps(&[Split(r"[\p{P}\$\+<=>\^~\|]+"), Split(GPT2), Split(r"\p{N}+"), Split("[0-9][0-9][0-9]")])),
];

/// Every name that is known.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    NAMES.iter().flat_map(|(names, _)| *names).copied()
}

/// The pre-tokenizer that the metadata names.
pub(super) fn of(metadata: &Metadata) -> Parsed<PreTokenizer> {
    let key = "tokenizer.ggml.pre";
    let Some(name) = metadata.text(key)? else {
        let detail = "is missing, so how the model cuts text into words is not known; files of before May 2024 lack it: \
                      convert the model again with a current llama.cpp";
        return Err(Problem::key(key, detail));
    };
    NAMES.iter().find(|(names, _)| names.contains(&name)).map(|(_, pre)| *pre).ok_or_else(|| {
        let known: Vec<_> = names().collect();
        Problem::key(key, format!("is '{}'; supported are {}", name.escape_debug(), known.join(", ")))
    })
}

impl PreTokenizer {
    pub(super) fn normalizer(&self) -> Value {
        if self.nfc { json!({ "type": "NFC" }) } else { Value::Null }
    }

    /// The steps, the last of which maps bytes to the printable characters that tokens are written in.
    pub(super) fn json(&self) -> Value {
        let byte_level = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
        let mut out: Vec<_> = self
            .steps
            .iter()
            .map(|step| match step {
                Digits => json!({ "type": "Digits", "individual_digits": true }),
                Gpt2 => byte_level(true),
                Split(expression) => {
                    let pattern = json!({ "Regex": expression });
                    json!({ "type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false })
                }
            })
            .collect();
        if !matches!(self.steps.last(), Some(Gpt2)) {
            out.push(byte_level(false));
        }
        json!({ "type": "Sequence", "pretokenizers": out })
    }
}
