"""Streaming download of a hub model: each weight file is downloaded when it is needed and deleted after use.

In: a hub id and the output folder of a conversion. Out: headers, and local paths of weight files on request. An interrupted
download is resumed by a range request and retried after a status of 429 or 5xx. Each file is checked against the length and the
SHA-256 that the hub reports.
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
DELAY = 0.5  # seconds before the second attempt; doubles with each
_FIRST_GUESS = 100_000  # bytes; most headers are shorter
_MAX_HEADER = 100_000_000
_MARK = ".mqadapt-download"
"""A file that marks a folder of downloads as created by this package."""


class Head(NamedTuple):
    """What is known of a weight file before its download."""

    name: str
    size: int
    head: bytes
    """The first bytes, which include the safetensors header."""
    tag: str
    """The ETag of the hub; the SHA-256 of a large file."""


class StoppedError(Exception):
    """The download was cancelled."""


class Shards:
    """The weight files of a hub model, for the extension module, which uses them from its own thread.

    Args:
        src: the hub id.
        dst: the output folder; downloads are stored beside it. Without it, only headers are available.

    Raises:
        ArgumentError: `src` is a local path.
        FileNotFoundError, PermissionError, ConnectionError: as `hub.fetch`.
    """

    def __init__(self, src: hub.Source, dst: str | os.PathLike[str] | None = None) -> None:
        place = hub.parse(src)
        if isinstance(place, Path):
            raise ArgumentError(f"{src}: is a local path; only a hub id can be converted while it is downloaded")
        self.folder = hub.fetch_companions(place)
        # the commit of the first request: later requests are of the same one
        self._place = hub.HubId(place.repo_id, self.folder.name)
        self._scratch = None if dst is None else Path(f"{Path(dst)}.mqadapt-download")
        self._begun = False
        self._stop = threading.Event()
        with hub.readable_errors(place):
            self.heads = [self._retry(name, partial(self._head, name)) for name in hub.weight_files(self.folder)]

    def acquire(self, name: str) -> str:
        """Download a file and return its path.

        Raises:
            OSError: the download failed, or its content is wrong.
        """
        if self._scratch is None:
            raise OSError(f"{self._place}: only the headers were downloaded")
        head = next(head for head in self.heads if head.name == name)
        self._begin(self._scratch)
        with hub.readable_errors(self._place):
            return str(self._retry(name, partial(self._download, head, self._scratch)))

    def _begin(self, folder: Path) -> None:
        """Create the folder of downloads, or reuse that of an interrupted conversion.

        Raises:
            ArgumentError: another file or folder has its name.
        """
        if self._begun:
            return
        mark = folder / _MARK
        if output_files.make_folder(folder, 0o700):
            output_files.write(mark, f"{self._place}\n".encode())
        elif mark.is_symlink() or not mark.is_file() or folder.stat().st_mode & 0o022:
            raise ArgumentError(
                f"{folder} is not a download folder of mqadapt; remove it, or choose another output folder"
            )
        for head in self.heads:
            if (folder / head.name).is_symlink():
                raise ArgumentError(
                    f"{folder / head.name} is a symbolic link; remove it, or choose another output folder"
                )
        self._begun = True

    def release(self, name: str) -> None:
        """Delete a file that is no longer needed."""
        if self._scratch is not None and self._begun:
            (self._scratch / name).unlink(missing_ok=True)

    def stop(self) -> None:
        """Cancel the running download."""
        self._stop.set()

    def close(self, keep: bool) -> None:
        """Delete the downloaded files and nothing else; `keep` leaves them for the next attempt."""
        if keep or self._scratch is None or not self._begun:
            return
        cache = self._scratch / ".cache"
        shutil.rmtree(cache / "huggingface", ignore_errors=True)  # metadata of the hub client
        for name in [*(head.name for head in self.heads), _MARK]:
            with contextlib.suppress(OSError):
                (self._scratch / name).unlink()
        for folder in (cache, self._scratch):
            with contextlib.suppress(OSError):  # the folder holds other files
                folder.rmdir()

    def _retry(self, name: str, work: Callable[[], _T]) -> _T:
        """Do the work, and retry it after transient errors."""
        delay = DELAY
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
            raise MqadaptError(f"{self._place.repo_id}/{name}: the hub reports no size or no checksum")
        head = _range(url, min(_FIRST_GUESS, about.size))
        needed = 8 + int.from_bytes(head[:8], "little")
        # a longer header is left to the parser, which reports the error
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
            raise _WrongContentError(f"{head.name}: expected {head.size} bytes, received {found}")
        if re.fullmatch(r"[0-9a-f]{64}", head.tag) and (sha256 := _sha256(path, stop)) != head.tag:
            path.unlink()
            raise _WrongContentError(f"{head.name}: expected SHA-256 {head.tag}, received {sha256}")
        return path


def headers(src: hub.Source) -> Shards | None:
    """Return the headers of a hub model whose weights are not in the cache; `None` for any other source.

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
    """The download does not have the expected length or checksum."""


def _may_pass(error: Exception) -> bool:
    """Whether an error is transient."""
    if isinstance(error, _WrongContentError):
        return True
    if isinstance(error, (StoppedError, MqadaptError)):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return bool(status == 429 or status >= 500)
    # broken connections and truncated responses
    return hub.is_connection_error(error)


def _until(stop: threading.Event, work: Callable[[], _T]) -> _T:
    """Do the work on a thread that is abandoned on cancellation, since the hub client cannot be cancelled."""
    outcome: Future[_T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised again by `result()`
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
