"""Atomic writes of result files, which follow no link and touch no file of another user.

In: a path and its content. Out: a file that gets its name when it is complete, or an open file that belongs to this user.
Unfinished files have random names and are created exclusively, so that no existing file is followed or truncated.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from typing import TYPE_CHECKING, BinaryIO

from mqadapt_rs.errors import ArgumentError

if TYPE_CHECKING:
    from pathlib import Path

_NEW = os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


def write(path: Path, content: bytes) -> None:
    """Write a file atomically. A link of its name is replaced, not followed.

    Raises:
        OSError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    descriptor = os.open(partial, os.O_WRONLY | _NEW, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync_folder(path.parent)


def open_own(path: Path) -> BinaryIO:
    """Open a file for reading and appending; create it if it does not exist.

    Raises:
        ArgumentError: the path is a link, not a regular file, or belongs to another user.
        OSError: the file cannot be opened.
    """
    flags = os.O_RDWR | os.O_APPEND
    with contextlib.suppress(FileExistsError):
        return os.fdopen(os.open(path, flags | _NEW, 0o666), "a+b")
    # a dangling link exists as well; O_NONBLOCK: opening a pipe would block
    _refuse(path, path.lstat())
    descriptor = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        _refuse(path, os.fstat(descriptor))
        return os.fdopen(descriptor, "a+b")
    except BaseException:
        os.close(descriptor)
        raise


def make_folder(path: Path, mode: int = 0o777) -> bool:
    """Create a folder, and return whether it did not exist. An existing one must belong to this user and not be a link.

    Raises:
        ArgumentError: the path is a link or a file, or belongs to another user.
        OSError: the folder cannot be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode)
    except FileExistsError:
        about = path.lstat()
        if not stat.S_ISDIR(about.st_mode):
            kind = "a symbolic link" if stat.S_ISLNK(about.st_mode) else "a file"
            raise ArgumentError(f"{path} is {kind}, where a folder is expected; remove it or choose another") from None
        if not _is_own(path.parent, about.st_uid):
            raise ArgumentError(f"{path} belongs to another user; remove it or choose another folder") from None
        return False
    return True


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk."""
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _refuse(path: Path, about: os.stat_result) -> None:
    if stat.S_ISLNK(about.st_mode):
        problem = "is a symbolic link"
    elif not stat.S_ISREG(about.st_mode):
        problem = "is not a regular file"
    elif about.st_nlink != 1:
        problem = "has another name (a hard link)"
    elif not _is_own(path.parent, about.st_uid):
        problem = "belongs to another user"
    else:
        return
    raise ArgumentError(f"{path} {problem}; remove it or choose another folder")


def _is_own(folder: Path, owner: int) -> bool:
    """Whether files that this process creates in a folder get this owner: a file server may map users."""
    if not hasattr(os, "geteuid") or owner == os.geteuid():
        return True
    probe = folder / f".{secrets.token_hex(8)}.owner"
    try:
        descriptor = os.open(probe, os.O_WRONLY | _NEW, 0o600)
    except OSError:
        return False
    try:
        return os.fstat(descriptor).st_uid == owner
    finally:
        os.close(descriptor)
        probe.unlink()
