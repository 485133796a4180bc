"""Text from outside (paths, names in files, fields, plans, tasks, tokens) made fit for a terminal, a page or a model card.

In: any text. Out: the same without characters that a terminal obeys, that a browser or a Markdown reader would act upon, or
that hide and reorder others; messages are shortened, too. JSON needs none of this: it escapes by itself and stays exact.
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
"""Characters of a long message that are kept at its beginning and its end."""
WORD = 255
"""Most characters between two spaces, slashes or quotes: no file system has longer names."""
KEPT = (120, 40)
"""Characters of a longer word that are kept at its beginning and its end."""
LONGEST_COMMAND = 1 << 15
_MARK = 64  # more than what stands for the middle takes, so that a message that was shortened stays as it is
# what terminals obey, and what is no character
_CONTROL = "\x00-\x1f\x7f-\x9f\ud800-\udfff"
# what cannot be seen, or reorders its neighbours; text of some languages needs it, names do not
_INVISIBLE = "\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"
_HIDDEN = re.compile(f"[{_CONTROL}{_INVISIBLE}]")
_OBEYED = re.compile(r"(?![\n\t])" + f"[{_CONTROL}]")
_IN_JSON = re.compile(r"(?!\n)" + f"[{_CONTROL}{_INVISIBLE}]")
_WORDS = re.compile(rf"[^\s/'\"`]{{{WORD + 1},}}")
_NAMED = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_MARKDOWN = re.compile(r"([\\`*_\[\]|~$])")


def readable(text: object) -> str:
    """A message in one line of bounded length: control, invisible and reordering characters are escaped."""
    shortened = _WORDS.sub(lambda word: _without_middle(word[0], KEPT), str(text))
    escaped = _HIDDEN.sub(_escape, shortened)
    return _without_middle(escaped, MESSAGE) if len(escaped) > sum(MESSAGE) + _MARK else escaped


def for_terminal(text: str) -> str:
    """Text of a model or a traceback for a terminal: line breaks and tabs stay, other control characters are escaped."""
    return _OBEYED.sub(_escape, text)


def for_json(document: str) -> str:
    """A JSON document of the same content in which no control, invisible or reordering character stands as itself."""
    return _IN_JSON.sub(_escape_in_json, document)


def as_html(text: object) -> str:
    """Text of a page."""
    return html.escape(readable(text))


def as_markdown(text: object) -> str:
    """Text of a Markdown page, in which nothing of it is markup: no HTML, no link, no formatting, no end of a table's cell."""
    return html.escape(_MARKDOWN.sub(r"\\\1", readable(text)), quote=False)


def as_code_block(command: str) -> str:
    """A command line as a block of code of a Markdown page. What could end a fence, or looks like HTML, is put in HTML."""
    if re.search(r"[<>`]|[^\x20-\x7e\xa0-\uffff]", command):
        return f"<pre><code>{html.escape(command, quote=False)}</code></pre>"
    return f"```sh\n{command}\n```"


def as_shell(words: Iterable[str]) -> str:
    """Words as a shell reads them again; those with hidden characters in the form `$'...'`, in which none stands as itself."""
    return " ".join(_shell_word(word) for word in words)


def as_shell_again(command: str) -> str:
    """A command line that was quoted for a shell, without hidden characters in it; one that no shell would take, shortened."""
    if not _HIDDEN.search(command) and len(command) <= LONGEST_COMMAND:
        return command
    try:
        # splitting takes the square of the length
        return as_shell(shlex.split(command)) if len(command) <= LONGEST_COMMAND else readable(command)
    except ValueError:  # of a file that was tampered with
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
