"""Bounded reads of regular files.

In: a path. Out: an open file, or its content. Pipes and devices are refused, since a pipe would block and a device may not end.
A file that is longer than any real file of its kind is refused before it fills the memory.
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
"""Largest `model.safetensors.index.json`, as in Rust."""
MAX_TOKENIZER_BYTES = 256 << 20
"""Largest file of a tokenizer; the largest real ones have 40 MB."""
MAX_RECORD_BYTES = 64 << 20
"""Largest JSON file of a model, a search or a measurement."""
MAX_JOURNAL_BYTES = 1 << 30
"""Largest journal of a search; an evaluation takes 20 bytes per document."""


class NotJsonError(MqadaptError, ValueError):
    """The content of a file is not JSON or not UTF-8."""


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file, or a link to one, for reading.

    Raises:
        MqadaptError: the path is a pipe, a device, a socket or a folder.
        OSError: the file cannot be opened.
    """
    path = Path(path)
    # checked before opening, because opening a device can have effects, and after, because the path can change in between
    try:
        if path.exists():
            _refuse_special(path, path.stat().st_mode)
        # O_NONBLOCK: opening a pipe would wait for its writer
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
    """Read a file of at most `limit` bytes.

    Raises:
        MqadaptError: the file is longer, or not regular.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise MqadaptError(
            f"{os.fspath(path)}: expected at most {limit} bytes, found more; the file is not what its name says"
        )
    return content


def read_text(path: str | os.PathLike[str], limit: int) -> str:
    """Read a UTF-8 file of at most `limit` bytes.

    Raises:
        MqadaptError, OSError: as `read_bytes`; the content is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode()
    except UnicodeDecodeError as error:
        raise NotJsonError(f"{os.fspath(path)}: not UTF-8: {error}") from error


def read_json(path: str | os.PathLike[str], limit: int = MAX_RECORD_BYTES) -> Any:
    """Read a JSON file.

    Raises:
        MqadaptError, OSError: as `read_text`; the content is not JSON.
    """
    try:
        return json_document.loads(read_text(path, limit))
    except ValueError as error:
        raise NotJsonError(f"{os.fspath(path)}: not JSON: {error}") from error


def refuse_special(folder: Path, patterns: Iterable[str], limit: int = MAX_TOKENIZER_BYTES) -> None:
    """Check that the files of a folder that a library will read are regular and have at most `limit` bytes.

    Raises:
        MqadaptError: a file is not.
    """
    patterns = list(patterns)
    for path in sorted(folder.iterdir()):
        if not any(fnmatch.fnmatchcase(path.name, pattern) for pattern in patterns) or path.is_dir():
            continue
        try:
            status = path.stat()
        except FileNotFoundError:  # a dangling link is not a file of the tokenizer
            continue
        _refuse_special(path, status.st_mode)
        if status.st_size > limit:
            raise MqadaptError(
                f"{path}: expected at most {limit} bytes, found {status.st_size}; it is not what its name says"
            )
