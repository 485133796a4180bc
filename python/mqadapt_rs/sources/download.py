"""A model of the hub, one weight file at a time: fetched when it is asked for, gone when it is given back.

In: a hub id and the folder that is being written. Out: what `convert` needs of a checkpoint that is not here as a whole. A
file is resumed by range request after a cut connection, asked for again after a status of 429 or 5xx, and checked for the
length and the SHA-256 that the hub announced.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import sys
import threading
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from mqadapt_rs import output_files
from mqadapt_rs.errors import ArgumentError, MqadaptError
from mqadapt_rs.readable import readable
from mqadapt_rs.sources import hub

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

_T = TypeVar("_T")
ATTEMPTS = 6
PATIENCE = 0.5  # seconds before the second attempt; doubles with each
_FIRST_GUESS = 100_000  # bytes; most headers are shorter
_MAX_HEADER = 100_000_000
_MARK = ".mqadapt-download"
"""A file that says that a folder of downloads is one of ours."""


class Head(NamedTuple):
    """What is known of a weight file before it is here."""

    name: str
    size: int
    head: bytes
    """Its first bytes: at least the safetensors header."""
    tag: str
    """The hub's ETag; the SHA-256 of a large file."""


class StoppedError(Exception):
    """The download was told to stop."""


class Shards:
    """Lends the weight files of a hub model. Used by the extension module, from a thread of its own.

    Args:
        src: the hub id.
        dst: the folder that is written; downloads go beside it. Without one only the headers can be looked at.

    Raises:
        ArgumentError: `src` is here already.
        FileNotFoundError, PermissionError, ConnectionError: as `hub.fetch`.
    """

    def __init__(self, src: hub.Source, dst: str | os.PathLike[str] | None = None) -> None:
        place = hub.parse(src)
        if isinstance(place, Path):
            raise ArgumentError(
                f"{src}: is on this machine already; only a hub id can be converted while it is downloaded"
            )
        self.folder = hub.fetch_companions(place)
        # the commit is fixed now: whatever is asked for later belongs to it
        self._place = hub.HubId(place.repo_id, self.folder.name)
        self._scratch = None if dst is None else Path(f"{Path(dst)}.mqadapt-download")
        self._begun = False
        self._stop = threading.Event()
        with hub.readable_errors(place):
            self.heads = [self._retry(name, partial(self._head, name)) for name in hub.weight_files(self.folder)]

    def acquire(self, name: str) -> str:
        """Brings a file here. Its path.

        Raises:
            OSError: the hub did not deliver it, or delivered something else.
        """
        if self._scratch is None:
            raise OSError(f"{self._place}: only its headers were fetched")
        head = next(head for head in self.heads if head.name == name)
        self._begin(self._scratch)
        with hub.readable_errors(self._place):
            return str(self._retry(name, partial(self._download, head, self._scratch)))

    def _begin(self, folder: Path) -> None:
        """Makes the folder of downloads, or takes over that of an interrupted conversion.

        Raises:
            ArgumentError: something else has its name.
        """
        if self._begun:
            return
        mark = folder / _MARK
        if output_files.make_folder(folder, 0o700):
            output_files.write(mark, f"{self._place}\n".encode())
        elif mark.is_symlink() or not mark.is_file() or folder.stat().st_mode & 0o022:
            raise ArgumentError(f"{folder} is not a folder of our downloads; remove it, or give another output folder")
        for head in self.heads:
            if (folder / head.name).is_symlink():
                raise ArgumentError(
                    f"{folder / head.name} is a symbolic link; remove it, or give another output folder"
                )
        self._begun = True

    def release(self, name: str) -> None:
        """The file is not needed any more."""
        if self._scratch is not None and self._begun:
            (self._scratch / name).unlink(missing_ok=True)

    def stop(self) -> None:
        """Ends a download that is under way."""
        self._stop.set()

    def close(self, keep: bool) -> None:
        """Removes what was downloaded, and nothing else; `keep` leaves it for the next attempt."""
        if keep or self._scratch is None or not self._begun:
            return
        cache = self._scratch / ".cache"
        shutil.rmtree(cache / "huggingface", ignore_errors=True)  # the hub client's notes
        for name in [*(head.name for head in self.heads), _MARK]:
            with contextlib.suppress(OSError):
                (self._scratch / name).unlink()
        for folder in (cache, self._scratch):
            with contextlib.suppress(OSError):  # something of someone else's is in it
                folder.rmdir()

    def _retry(self, name: str, work: Callable[[], _T]) -> _T:
        """Does it again where it may help."""
        delay = PATIENCE
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return work()
            except Exception as error:
                if attempt == ATTEMPTS or not _may_pass(error):
                    raise
                words = f"{self._place.repo_id}/{name}: {error}; attempt {attempt + 1} of {ATTEMPTS}"
                print(readable(words), file=sys.stderr)
            if self._stop.wait(delay):
                raise StoppedError(name)
            delay *= 2
        raise AssertionError("unreachable")

    def _head(self, name: str) -> Head:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url

        url = hf_hub_url(self._place.repo_id, name, revision=self._place.revision)
        about = get_hf_file_metadata(url)
        if about.size is None or about.etag is None:
            raise MqadaptError(f"{self._place.repo_id}/{name}: the hub tells neither its size nor its checksum")
        head = _range(url, min(_FIRST_GUESS, about.size))
        needed = 8 + int.from_bytes(head[:8], "little")
        # a header longer than any honest one is left to the reader, who says what is wrong with it
        if len(head) < needed <= min(_MAX_HEADER, about.size):
            head = _range(url, needed)
        return Head(name, about.size, head, about.etag)

    def _download(self, head: Head, folder: Path) -> Path:
        from huggingface_hub import hf_hub_download

        stop = self._stop
        download = partial(
            hf_hub_download,
            self._place.repo_id,
            head.name,
            revision=self._place.revision,
            local_dir=folder,
            library_name="mqadapt-rs",
        )
        path = Path(_until(stop, download))
        found = path.stat().st_size
        if found != head.size:
            path.unlink()
            raise _WrongContentError(f"{head.name}: {found} bytes came, {head.size} were announced")
        if re.fullmatch(r"[0-9a-f]{64}", head.tag) and (sha256 := _sha256(path, stop)) != head.tag:
            path.unlink()
            raise _WrongContentError(f"{head.name}: what came has SHA-256 {sha256}, the hub announced {head.tag}")
        return path


def headers(src: hub.Source) -> Shards | None:
    """The headers of a hub model whose weights are not on this machine; `None` of any other.

    Raises:
        FileNotFoundError, PermissionError, ConnectionError: as `hub.fetch`.
    """
    place = hub.parse(src)
    if isinstance(place, Path):
        return None
    folder = hub.fetch_companions(place)
    if all((folder / name).exists() for name in hub.weight_files(folder)):
        return None
    return Shards(src)


class _WrongContentError(OSError):
    """The download does not have the announced length or checksum."""


def _may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    if isinstance(error, _WrongContentError):
        return True
    if isinstance(error, (StoppedError, MqadaptError)):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return bool(status == 429 or status >= 500)
    # connections that break, and lengths that do not fit
    return hub.is_connection_error(error)


def _until(stop: threading.Event, work: Callable[[], _T]) -> _T:
    """Does the work on a thread that is left behind when it is to stop: the hub client cannot be told to."""
    outcome: Future[_T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again where the outcome is asked for
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    while not stop.is_set():
        if wait([outcome], timeout=0.05).done:
            return outcome.result()
    raise StoppedError


def _range(url: str, count: int) -> bytes:
    from huggingface_hub import utils

    response = utils.get_session().get(url, headers={**utils.build_hf_headers(), "Range": f"bytes=0-{count - 1}"})
    utils.hf_raise_for_status(response)
    content: bytes = response.content
    return content[:count]


def _sha256(path: Path, stop: threading.Event) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            if stop.is_set():
                raise StoppedError
            digest.update(block)
    return digest.hexdigest()
