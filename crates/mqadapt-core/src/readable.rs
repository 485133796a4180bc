//! Text from outside (names in a file, paths, fields of a configuration), made fit for a message.
//!
//! In: a message that quotes such text. Out: the message in one line of bounded length, without characters that a terminal
//! obeys or that hide or reorder others. `python/mqadapt_rs/readable.py` does the same for what Python prints.

use std::fmt::Write;

/// Most characters of a message; what is beyond is left out of its middle.
const MESSAGE: (usize, usize) = (800, 300);
/// Most characters between two spaces, slashes or quotes: no file system has longer names.
const WORD: usize = 255;
/// Characters of a longer word that are kept at its beginning and its end.
const KEPT: (usize, usize) = (120, 40);

/// A message in one line: control characters are escaped (`\x1b`, `\n`), so are invisible and reordering ones (`\u202e`), and
/// long words and long messages lose their middle.
#[must_use]
pub fn readable(message: &str) -> String {
    let mut out = String::with_capacity(message.len().min(4 * WORD));
    let ends_word = |c: char| c.is_whitespace() || matches!(c, '/' | '\'' | '"' | '`');
    for word in message.split_inclusive(ends_word) {
        // with the character that ends it
        for c in without_middle(word, WORD + 1, KEPT).chars() {
            escape(c, &mut out);
        }
    }
    without_middle(&out, MESSAGE.0 + MESSAGE.1 + MARK, MESSAGE)
}

/// More characters than what stands for the middle takes, so that a message that was shortened stays as it is.
const MARK: usize = 64;

/// Whether a character says something to the terminal rather than to the reader, or cannot be seen.
fn is_hidden(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
}

fn escape(c: char, out: &mut String) {
    let written = match (c, c as u32) {
        ('\n', _) => out.write_str("\\n"),
        ('\r', _) => out.write_str("\\r"),
        ('\t', _) => out.write_str("\\t"),
        (_, code) if !is_hidden(c) => char::from_u32(code).map_or(Ok(()), |c| out.write_char(c)),
        (_, code @ ..=0xff) => write!(out, "\\x{code:02x}"),
        (_, code @ ..=0xffff) => write!(out, "\\u{code:04x}"),
        (_, code) => write!(out, "\\U{code:08x}"),
    };
    debug_assert!(written.is_ok(), "a string takes everything");
}

/// A text of no more than about `most` characters: of a longer one the beginning and the end.
fn without_middle(text: &str, most: usize, (begin, end): (usize, usize)) -> String {
    let count = text.chars().count();
    if count <= most {
        return text.to_owned();
    }
    let head: String = text.chars().take(begin).collect();
    let tail: String = text.chars().skip(count - end).collect();
    format!("{head}[... {} characters ...]{tail}", count - begin - end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_obeys_is_escaped() {
        assert_eq!(readable("\u{1b}[31mred\u{1b}[0m\u{7}\r\n\t\u{9b}2J"), r"\x1b[31mred\x1b[0m\x07\r\n\t\x9b2J");
        assert_eq!(readable("a\u{202e}b\u{2028}c\u{e0041}"), r"a\u202eb\u2028c\U000e0041");
    }

    #[test]
    fn ordinary_text_stays() {
        for text in ["", "model.layers.0: expected [24, 72]; do 'x'", "größe 🦙 日本語 e\u{301}", r"C:\new \x1b"]
        {
            assert_eq!(readable(text), text);
        }
    }

    #[test]
    fn long_names_and_messages_lose_their_middle() {
        let name = "x".repeat(1 << 20);
        let shown = readable(&format!("tensor '{name}' is stored as I32; supported are F32"));
        assert!(shown.len() < 300, "{shown}");
        assert!(
            shown.starts_with("tensor 'xxx") && shown.ends_with("xxx' is stored as I32; supported are F32"),
            "{shown}"
        );
        assert!(shown.contains("[... 1048417 characters ...]"), "{shown}");
        let path = format!("/{}", ["d".repeat(255).as_str(); 3].join("/"));
        assert_eq!(readable(&path), path);
        let shown = readable(&format!("{} end", "\u{1b} ".repeat(1 << 20)));
        assert!(shown.len() < 1300 && shown.ends_with(" end"), "{shown}");
        assert_eq!(readable(&shown), shown);
    }
}
