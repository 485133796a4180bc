"""Text and tokens. In: documents and a model. Out: texts, and token ids by the default settings of the tokenizer."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from mqadapt_rs import files, json_document
from mqadapt_rs.arguments import whole
from mqadapt_rs.errors import ArgumentError, MqadaptError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from tokenizers import Tokenizer

    from mqadapt_rs.sources.hub import Source

ANOTHER_FIELD = "--field names another, of a calibration text --calibration-field"
"""Advice of errors about a record without the field."""
_SURROGATE = re.compile("[\ud800-\udfff]")

MAX_CHARACTERS = 256 << 20
"""Longest text that is read completely; its tokens take tens of gigabytes."""
MAX_LINE = 64 << 20
"""Longest line of a record file, in characters."""

_MARGIN = 1024
"""Extra tokens that are encoded: where a text is cut, its last tokens may differ."""


def read_documents(file: str | os.PathLike[str], field: str = "text", characters: int | None = None) -> Iterator[str]:
    """Yield the documents of a file: a plain text is one; `.jsonl` and `.jsonl.gz` hold one per line, in `field`.

    With `characters`, reading stops after about that many: a plain text is cut there, and the last record is complete.

    Raises:
        OSError: the file cannot be read.
        MqadaptError: a line is not an object with that field, the file is not UTF-8 or not regular, or it exceeds
            `MAX_CHARACTERS`.
    """
    path = Path(file)
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        yield read_plain(path, False, characters)
        return
    total = 0
    for document in read_records(path, field, path.name.endswith(".gz")):
        total += len(document)
        if total > MAX_CHARACTERS:
            raise _too_long(path)
        yield document
        if characters is not None and total >= characters:
            return


def read_plain(path: Path, gzipped: bool, characters: int | None = None) -> str:
    """Read a plain text, or its first `characters`, as one document.

    Raises:
        OSError, MqadaptError: as `read_documents`.
    """
    with _open(path, gzipped) as file:
        if characters is not None and characters <= MAX_CHARACTERS:
            return file.read(characters)
        words = file.read(MAX_CHARACTERS + 1)
    if len(words) > MAX_CHARACTERS:
        raise _too_long(path)
    return words


def _too_long(path: Path) -> MqadaptError:
    return MqadaptError(
        f"{path}: expected a text of at most {MAX_CHARACTERS} characters, found more; use a part of it, or fewer "
        "windows or tokens"
    )


def read_records(path: Path, field: str, gzipped: bool) -> Iterator[str]:
    """Yield the texts of a file that holds one record per line.

    Raises:
        OSError, MqadaptError: as `read_documents`.
    """
    with _open(path, gzipped) as lines:
        number = 0
        while line := lines.readline(MAX_LINE + 1):
            number += 1
            if len(line) > MAX_LINE:
                raise MqadaptError(
                    f"{path}, line {number}: expected a record of at most {MAX_LINE} characters, found more; cut the text "
                    "into records of that length"
                )
            if line.strip():
                yield _document(line, field, f"{path}, line {number}")


@contextmanager
def _open(path: Path, gzipped: bool) -> Iterator[IO[str]]:
    try:
        with (
            files.open_regular(path) as stored,
            gzip.GzipFile(fileobj=stored, mode="rb") if gzipped else stored as content,
            io.TextIOWrapper(content, encoding="utf-8") as file,
        ):
            yield file
    except UnicodeDecodeError as error:
        raise MqadaptError(f"{path}: expected UTF-8 text; found {error}") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise MqadaptError(f"{path}: not a whole gzip file ({error}); compress or download it again") from error


def _document(line: str, field: str, where: str) -> str:
    try:
        record = json_document.loads(line)
    except ValueError as error:
        raise MqadaptError(f"{where}: not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        found = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise MqadaptError(f"{where}: expected an object with a text in '{field}' ({ANOTHER_FIELD}); found {found}")
    text = str(record[field])
    if (half := _SURROGATE.search(text)) is not None:
        found = f"\\u{ord(half[0]):04x} at character {half.start()}"
        raise MqadaptError(f"{where}: expected Unicode text in '{field}'; found half of a surrogate pair ({found})")
    return text


def load_tokenizer(src: Source) -> Tokenizer:
    """Load the `tokenizer.json` of a model, without its stored truncation and padding.

    Raises:
        FileNotFoundError: the model has no `tokenizer.json`.
        MqadaptError: the tokenizers library cannot read the file, or it is not regular.
    """
    from tokenizers import Tokenizer

    from mqadapt_rs.sources import hub

    file = hub.fetch_tokenizer(src) / "tokenizer.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: the model has no tokenizer.json; text needs one (token ids do not)")
    content = files.read_text(file, files.MAX_TOKENIZER_BYTES)
    try:
        tokenizer = Tokenizer.from_str(content)
    except Exception as error:  # the library raises bare `Exception`s
        raise MqadaptError(f"{file}: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def token_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text, with the special tokens that the tokenizer adds by default.

    Raises:
        ArgumentError: the text holds half of a surrogate pair (an argument that is not UTF-8, for instance).
    """
    if (half := _SURROGATE.search(text)) is not None:
        found = f"\\u{ord(half[0]):04x} at character {half.start()}"
        raise ArgumentError(f"the text must be Unicode (UTF-8); found half of a surrogate pair ({found})")
    return list(tokenizer.encode(text).ids)


def read_ids(tokenizer: Tokenizer, file: str | os.PathLike[str], field: str, tokens: int | None) -> list[int]:
    """Encode the concatenated documents of a file; with `tokens`, a beginning that holds at least that many.

    Raises:
        OSError, MqadaptError: as `read_documents`.
    """
    if tokens is None:
        return token_ids(tokenizer, "".join(read_documents(file, field)))
    characters = max(1 << 20, 8 * tokens)
    while True:
        words = "".join(read_documents(file, field, characters))
        ids = token_ids(tokenizer, words)
        if len(words) < characters or len(ids) >= tokens + _MARGIN:
            return ids
        characters *= 4


def first_windows(ids: list[int], context: int, windows: int | None) -> list[int]:
    """Return the ids of the first `windows` complete windows of `context` tokens, or of all if it is `None`.

    Raises:
        ArgumentError: the text has fewer windows.
    """
    context, windows = whole("context", context, 1), whole("windows", windows, 1)
    available = len(ids) // context
    wanted = available if windows is None else windows
    if not 1 <= wanted <= available:
        raise ArgumentError(
            f"the text has {len(ids)} tokens, {available} windows of {context}; "
            f"{'at least one is' if windows is None else f'{windows} are'} needed"
        )
    return ids[: wanted * context]
