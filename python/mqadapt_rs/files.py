"""Files that a user or a model names: regular ones only, opened without waiting, read up to a bound.

In: a path. Out: an open file, or its content. A pipe would wait for its writer and a device may never end, so neither is read;
what is longer than any real file of its kind is refused before it fills the memory.
"""

from __future__ import annotations

import fnmatch
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from mqadapt_rs import json_document
from mqadapt_rs.errors import MqadaptError

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_INDEX_BYTES = 100_000_000
"""Longest `model.safetensors.index.json`, as in Rust."""
MAX_TOKENIZER_BYTES = 256 << 20
"""Longest file of a tokenizer; the largest real ones have 40 MB."""
MAX_RECORD_BYTES = 64 << 20
"""Longest file of facts about a model, a search or a measurement."""
MAX_JOURNAL_BYTES = 1 << 30
"""Longest journal of a search: a line of 20 bytes a document for every evaluation."""


class NotJsonError(MqadaptError, ValueError):
    """The content of a file is not JSON, or not even text."""


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a regular file, or a link to one, for reading.

    Raises:
        MqadaptError: a pipe, a device, a socket or a folder.
        OSError: it cannot be opened.
    """
    path = Path(path)
    # asked before opening, because opening a device can do something; and after, because the path can change in between
    try:
        if path.exists():
            _refuse_special(path, path.stat().st_mode)
        # a pipe would wait for its writer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except ValueError as error:  # half of a surrogate pair, or a null byte
        raise MqadaptError(f"{path}: expected the name of a file; found one that cannot be ({error})") from error
    try:
        _refuse_special(path, os.fstat(descriptor).st_mode)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _refuse_special(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise MqadaptError(
            f"{os.fspath(path)}: expected a regular file, found {kind}; write the content to a file and give that file's path"
        )


def read_bytes(path: str | os.PathLike[str], limit: int) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises:
        MqadaptError: it is longer, or not a regular file.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise MqadaptError(
            f"{os.fspath(path)}: expected at most {limit} bytes, found more; the file is not what its name says"
        )
    return content


def read_text(path: str | os.PathLike[str], limit: int) -> str:
    """As `read_bytes`, of a file in UTF-8.

    Raises:
        MqadaptError, OSError: as `read_bytes`; the content is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise NotJsonError(f"{os.fspath(path)}: not UTF-8: {error}") from error


def read_json(path: str | os.PathLike[str], limit: int = MAX_RECORD_BYTES) -> Any:
    """The content of a JSON file.

    Raises:
        MqadaptError, OSError: as `read_text`; the content is not JSON.
    """
    try:
        return json_document.loads(read_text(path, limit))
    except ValueError as error:
        raise NotJsonError(f"{os.fspath(path)}: not JSON: {error}") from error


def refuse_special(folder: Path, patterns: Iterable[str], limit: int = MAX_TOKENIZER_BYTES) -> None:
    """Checks the files of a folder that a library will read by itself: regular ones, and no longer than `limit` bytes.

    Raises:
        MqadaptError: one is not.
    """
    patterns = list(patterns)
    for path in sorted(folder.iterdir()):
        if not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns) or path.is_dir():
            continue
        try:
            status = path.stat()
        except FileNotFoundError:  # a link that leads nowhere is none of the tokenizer's files
            continue
        _refuse_special(path, status.st_mode)
        if status.st_size > limit:
            raise MqadaptError(
                f"{path}: expected at most {limit} bytes, found {status.st_size}; it is not what its name says"
            )
