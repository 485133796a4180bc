"""Escaping of untrusted text (paths, names in files, fields, plans, tasks, tokens) for terminals, pages and model cards.

In: any text. Out: the same text without control, invisible and reordering characters, and without HTML or Markdown markup;
messages are shortened, too. JSON escapes by itself and stays exact.
`crates/mqadapt-core/src/readable.rs` does the same for messages that come from Rust.
"""

from __future__ import annotations

import html
import re
import shlex
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

MESSAGE = (800, 300)
"""Characters that a shortened message keeps at its beginning and its end."""
WORD = 255
"""Most characters between two spaces, slashes or quotes: no file system has longer names."""
KEPT = (120, 40)
"""Characters that a shortened word keeps at its beginning and its end."""
LONGEST_COMMAND = 1 << 15
_MARK = 64  # longer than the mark of an omission, so that a shortened message is not shortened again
# control characters, and halves of surrogate pairs
_CONTROL = "\x00-\x1f\x7f-\x9f\ud800-\udfff"
# invisible and reordering characters; text of some languages needs them, names do not
_INVISIBLE = "\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
_HIDDEN = re.compile(f"[{_CONTROL}{_INVISIBLE}]")
_OBEYED = re.compile(r"(?![\n\t])" + f"[{_CONTROL}]")
_IN_JSON = re.compile(r"(?!\n)" + f"[{_CONTROL}{_INVISIBLE}]")
_WORDS = re.compile(rf"[^\s/'\"`]{{{WORD + 1},}}")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")


def readable(text: object) -> str:
    """Format a message as one line of bounded length, with control, invisible and reordering characters escaped."""
    shortened = _WORDS.sub(lambda word: _without_middle(word[0], KEPT), str(text))
    escaped = _HIDDEN.sub(_escape, shortened)
    return _without_middle(escaped, MESSAGE) if len(escaped) > sum(MESSAGE) + _MARK else escaped


def for_terminal(text: str) -> str:
    """Escape the control characters of a text for a terminal, except line breaks and tabs."""
    return _OBEYED.sub(_escape, text)


def for_json(document: str) -> str:
    """Escape the control, invisible and reordering characters of a JSON document; its content stays the same."""
    return _IN_JSON.sub(_escape_in_json, document)


def as_html(text: object) -> str:
    """Escape text for an HTML page."""
    return html.escape(readable(text))


def as_markdown(text: object) -> str:
    """Escape text for a Markdown page, so that none of it is markup."""
    return html.escape(_MARKDOWN.sub(r"\\\1", readable(text)), quote=False)


def as_code_block(command: str) -> str:
    """Format a command line as a code block of a Markdown page; as HTML if it could end a fence or contains markup."""
    if re.search(r"[<>`]|[^\x20-\x7e\xa0-\uffff]", command):
        return f"<pre><code>{html.escape(command, quote=False)}</code></pre>"
    return f"```sh\n{command}\n```"


def as_shell(words: Iterable[str]) -> str:
    """Quote words for a shell; words with hidden characters in the form `$'...'`, which escapes them."""
    return " ".join(_shell_word(word) for word in words)


def as_shell_again(command: str) -> str:
    """Escape the hidden characters of a quoted command line; one that no shell accepts is shortened."""
    if not _HIDDEN.search(command) and len(command) <= LONGEST_COMMAND:
        return command
    try:
        # splitting takes quadratic time
        return as_shell(shlex.split(command)) if len(command) <= LONGEST_COMMAND else readable(command)
    except ValueError:  # from a modified file
        return readable(command)


def _shell_word(word: str) -> str:
    if not _HIDDEN.search(word):
        return shlex.quote(word)
    plain = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + _HIDDEN.sub(lambda match: "".join(f"\\x{byte:02x}" for byte in _bytes(match[0])), plain) + "'"


def _bytes(character: str) -> bytes:
    return character.encode("utf-8", "surrogateescape" if "\udc80" <= character <= "\udcff" else "surrogatepass")


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    known = _NAMED.get(match[0])
    return known or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}")


def _escape_in_json(match: re.Match[str]) -> str:
    units = match[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at] << 8 | units[at + 1]:04x}" for at in range(0, len(units), 2))


def _without_middle(text: str, kept: tuple[int, int]) -> str:
    begin, end = kept
    return f"{text[:begin]}[... {len(text) - begin - end} characters ...]{text[-end:]}"
