//! Tokenizers are rebuilt from metadata, loaded by `tokenizers` and used.

use serde_json::Value;
use tokenizers::Tokenizer;

use crate::gguf::header::Header;
use crate::gguf::metadata::ModelKeys;
use crate::gguf::test_writer::TestFile;
use crate::side_files::Content;

/// GPT-2's printable characters for bytes: the byte itself where it is printable, else the next character above 255.
fn printable(byte: u8) -> char {
    let kept = |b: &u8| matches!(b, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if kept(&byte) {
        return char::from(byte);
    }
    let position = (0..byte).filter(|b| !kept(b)).count() as u32;
    char::from_u32(256 + position).unwrap()
}

/// All bytes, some merges, three special tokens and one user-defined.
fn byte_level(pre: &str) -> TestFile {
    let merges = ["Ġ Ġ", "h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "12 3", "Ġ 1", "Ġ 12"];
    let mut tokens = vec!["<|endoftext|>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    tokens.extend((0..=255).map(|byte| printable(byte).to_string()));
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    tokens.push("[TOOL]".to_owned());
    tokens.push("[PAD270]".to_owned());
    let mut types = vec![1; tokens.len()];
    types[..3].fill(3);
    types[tokens.len() - 2] = 4;
    types[tokens.len() - 1] = 5;
    TestFile::new()
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", pre)
        .texts("tokenizer.ggml.tokens", &tokens.iter().map(String::as_str).collect::<Vec<_>>())
        .i32s("tokenizer.ggml.token_type", &types)
        .texts("tokenizer.ggml.merges", &merges)
        .u32("tokenizer.ggml.bos_token_id", 1)
        .u32("tokenizer.ggml.eos_token_id", 2)
}

/// As stories260K's: byte tokens, single characters, scores that fall with the id.
fn sentencepiece() -> TestFile {
    let mut tokens = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["▁t", "he", "▁the", "er", "re", "▁there"].map(str::to_owned));
    tokens.extend("▁thers".chars().map(String::from));
    let mut types = vec![1; tokens.len()];
    types[0] = 2;
    types[1..3].fill(3);
    types[3..259].fill(6);
    let scores: Vec<f32> = (0..tokens.len()).map(|id| if id < 259 { 0.0 } else { 259.0 - id as f32 }).collect();
    TestFile::new()
        .text("tokenizer.ggml.model", "llama")
        .texts("tokenizer.ggml.tokens", &tokens.iter().map(String::as_str).collect::<Vec<_>>())
        .i32s("tokenizer.ggml.token_type", &types)
        .f32s("tokenizer.ggml.scores", &scores)
}

fn files(file: &TestFile) -> Result<Vec<(String, Value)>, String> {
    let bytes = file.bytes();
    let header = Header::read(&bytes.as_slice()).unwrap();
    let keys = ModelKeys { metadata: &header.metadata, architecture: "llama" };
    let files = super::side_files(keys).map_err(|problem| problem.in_file("x".as_ref()).to_string())?;
    let parsed = files.into_iter().map(|file| {
        let Content::Bytes(bytes) = file.content else { panic!("made, not copied") };
        let value = serde_json::from_slice(&bytes).unwrap_or_else(|_| String::from_utf8(bytes).unwrap().into());
        (file.name, value)
    });
    Ok(parsed.collect())
}

fn named(file: &TestFile, name: &str) -> Value {
    files(file).unwrap().into_iter().find(|(own, _)| own == name).unwrap().1
}

fn tokenizer(file: &TestFile) -> Tokenizer {
    named(file, "tokenizer.json").to_string().parse().unwrap()
}

fn pieces(file: &TestFile, text: &str) -> Vec<String> {
    tokenizer(file).encode(text, true).unwrap().get_tokens().to_vec()
}

#[track_caller]
fn refused(file: &TestFile, expected: &str) {
    let error = files(file).expect_err("the metadata is wrong");
    assert!(error.contains(expected), "expected '{expected}' in '{error}'");
}

const TEXTS: [&str; 6] = [
    "hello 123 hello123",
    "  two  spaces\n\n\tand\r\na tab ",
    "déjà vu, naïve façade — «quotes»",
    "日本語 한국어 Русский ქართული",
    "🦙👩‍👩‍👧 emoji 3.14159",
    "I'll <s>nested</s> [TOOL] it's",
];

#[test]
fn every_pre_tokenizer_loads_and_decodes_to_what_was_encoded() {
    let names: Vec<&str> = super::pre_tokenizer::names().collect();
    assert!(names.len() > 30);
    for name in names {
        let json = named(&byte_level(name), "tokenizer.json").to_string();
        let tokenizer: Tokenizer = json.parse().unwrap_or_else(|error| panic!("{name}: {error}"));
        for text in TEXTS {
            let ids = tokenizer.encode(text, false).unwrap();
            assert_eq!(tokenizer.decode(ids.get_ids(), false).unwrap(), text, "{name}");
        }
    }
}

#[test]
fn digits_stand_alone_where_the_model_has_them_so() {
    assert_eq!(pieces(&byte_level("gpt-2"), "a 123"), ["a", "Ġ", "123"]);
    assert_eq!(pieces(&byte_level("smollm"), "a  123"), ["a", "ĠĠ", "1", "2", "3"]);
    assert_eq!(pieces(&byte_level("qwen2"), "a 123"), ["a", "Ġ", "1", "2", "3"]);
    assert_eq!(pieces(&byte_level("llama-bpe").flag("tokenizer.ggml.add_bos_token", false), "1234"), ["123", "4"]);
}

#[test]
fn special_tokens_are_found_in_text() {
    assert_eq!(pieces(&byte_level("smollm"), "he</s>[TOOL]ll"), ["he", "</s>", "[TOOL]", "ll"]);
    let tokenizer = tokenizer(&byte_level("smollm"));
    let ids = tokenizer.encode("he</s>[TOOL]ll", true).unwrap();
    assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), "he[TOOL]ll", "only control tokens are special");
}

#[test]
fn tokens_at_the_ends_as_the_metadata_says() {
    let both = |bos, eos| {
        byte_level("smollm").flag("tokenizer.ggml.add_bos_token", bos).flag("tokenizer.ggml.add_eos_token", eos)
    };
    assert_eq!(pieces(&both(false, false), "he"), ["he"]);
    assert_eq!(pieces(&both(true, false), "he"), ["<s>", "he"]);
    assert_eq!(pieces(&both(true, true), "he"), ["<s>", "he", "</s>"]);
    assert_eq!(pieces(&byte_level("smollm"), "he"), ["he"]);
    assert_eq!(pieces(&byte_level("llama-bpe"), "he"), ["<s>", "he"], "as llama.cpp where the file does not say");
    assert_eq!(named(&both(true, false), "tokenizer_config.json")["add_bos_token"], true);
}

#[test]
fn fillers_are_left_out() {
    let json = named(&byte_level("smollm"), "tokenizer.json");
    assert!(json["model"]["vocab"].get("[PAD270]").is_none());
    assert!(json["model"]["vocab"].get("[TOOL]").is_some());
}

#[test]
fn generation_stops_at_every_end() {
    let file = byte_level("smollm").u32("tokenizer.ggml.eot_token_id", 2).u32("tokenizer.ggml.eom_token_id", 0);
    let config = named(&file, "generation_config.json");
    assert_eq!(config["eos_token_id"], serde_json::json!([2, 0]));
    assert_eq!(named(&byte_level("smollm"), "generation_config.json")["eos_token_id"], 2);
}

#[test]
fn chat_template_is_a_file_and_in_the_configuration() {
    let file = byte_level("smollm").text("tokenizer.chat_template", "{{ messages }}");
    assert_eq!(named(&file, "chat_template.jinja"), "{{ messages }}");
    assert_eq!(named(&file, "tokenizer_config.json")["chat_template"], "{{ messages }}");
}

#[test]
fn sentencepiece_merges_by_score() {
    assert_eq!(pieces(&sentencepiece(), "there the"), ["<s>", "▁there", "▁the"]);
    // 'he' has a higher score than 'er', which shares its letter
    assert_eq!(pieces(&sentencepiece(), "ther"), ["<s>", "▁the", "r"]);
    assert_eq!(pieces(&sentencepiece(), "é"), ["<s>", "▁", "<0xC3>", "<0xA9>"]);
    let tokenizer = tokenizer(&sentencepiece());
    for text in TEXTS.iter().filter(|text| !text.contains("<s>")) {
        let ids = tokenizer.encode(*text, true).unwrap();
        assert_eq!(tokenizer.decode(ids.get_ids(), true).unwrap(), *text);
    }
}

#[test]
fn sentencepiece_without_a_space_in_front() {
    let file = sentencepiece().flag("tokenizer.ggml.add_space_prefix", false);
    assert_eq!(pieces(&file, "he"), ["<s>", "he"]);
}

#[test]
fn a_file_without_tokenizer_has_no_files() {
    assert!(files(&TestFile::new()).unwrap().is_empty());
    assert!(files(&TestFile::new().text("tokenizer.ggml.model", "no_vocab")).unwrap().is_empty());
}

#[test]
fn unknown_tokenizer_or_pre_tokenizer_is_named() {
    refused(&byte_level("smollm").text("tokenizer.ggml.model", "t5"), "is 't5'; supported are 'gpt2'");
    refused(&byte_level("kimi-k2"), "is 'kimi-k2'; supported are smollm");
    refused(&byte_level("smollm").without("tokenizer.ggml.pre"), "'tokenizer.ggml.pre' is missing");
}

#[test]
fn malformed_vocabularies() {
    let file = || byte_level("smollm");
    refused(&file().without("tokenizer.ggml.tokens"), "'tokenizer.ggml.tokens' is missing");
    refused(&file().without("tokenizer.ggml.merges"), "'tokenizer.ggml.merges' is missing");
    refused(&file().texts("tokenizer.ggml.tokens", &["a", "b", "a"]), "has 'a' twice, as 0 and 2");
    refused(&file().i32s("tokenizer.ggml.token_type", &[1, 1]), "has 2 entries for");
    refused(&file().i32s("tokenizer.ggml.tokens", &[1, 1]), "expected an array of strings");
    refused(&file().texts("tokenizer.ggml.merges", &["nospace"]), "not two tokens and a space");
    refused(&file().texts("tokenizer.ggml.merges", &["h zebra"]), "not a token");
    refused(&file().u32("tokenizer.ggml.bos_token_id", 99_999), "is 99999, but the vocabulary has");
    refused(
        &file().without("tokenizer.ggml.bos_token_id").flag("tokenizer.ggml.add_bos_token", true),
        "names no such token",
    );
    refused(&sentencepiece().without("tokenizer.ggml.scores"), "'tokenizer.ggml.scores' is missing");
    refused(&sentencepiece().f32s("tokenizer.ggml.scores", &[0.0]), "has 1 entries for");
}
