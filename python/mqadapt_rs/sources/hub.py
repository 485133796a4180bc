"""Resolution of model sources. In: a folder, a `.gguf` file or a hub id `org/name[@revision]`. Out: a local path.

Downloads go through huggingface_hub, so that `HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_OFFLINE` have their usual
meaning. A source that looks like a path never causes a request.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import tempfile
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mqadapt_rs import files
from mqadapt_rs.errors import MqadaptError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Source = str | os.PathLike[str]

_HUB_ID = re.compile(r"(?P<repo_id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# files beside the weights: configuration, tokenizer, chat template, licence, model card; no other weight format
_COMPANIONS = ["*.json", "*.jinja", "*.model", "*.txt", "*.md", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*"]
_TOKENIZER = ["config.json", "tokenizer*", "special_tokens_map.json", "generation_config.json", "*chat_template*"]
# `original/`, `onnx/` and others hold copies of the weights; all folders except `additional_chat_templates/`
_SUBFOLDERS = ["[!a]*/*", "a[!d]*/*", "ad[!d]*/*", "*/*/*"]


class HubId(NamedTuple):
    """A repository of the hub."""

    repo_id: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo_id + (f"@{self.revision}" if self.revision else "")


def parse(src: Source) -> Path | HubId:
    """Parse a source as an existing local path or a hub id.

    Raises:
        FileNotFoundError: the source is neither.
    """
    text = os.fspath(src)
    path = Path(text).expanduser()
    if text and path.exists():
        return path
    match = _HUB_ID.fullmatch(text)
    # `folder/model` is a misspelt path rather than a hub id if `folder` exists
    if match is None or not isinstance(src, str) or text.endswith((".gguf", ".safetensors")) or path.parent.exists():
        message = f"{text}: no such folder or file; a model is a folder, a .gguf file or a hub id org/name[@revision]"
        raise FileNotFoundError(message)
    return HubId(match["repo_id"], match["revision"])


def fetch(src: Source) -> Path:
    """Return the local path of a model; the files of a hub id are downloaded into the cache of the hub.

    Raises:
        FileNotFoundError: there is no such model.
        MqadaptError: the repository has no safetensors weights.
        OSError: the hub cannot be reached or refuses the request.
    """
    place = parse(src)
    if isinstance(place, Path):
        return place
    folder = fetch_companions(place)
    weights = weight_files(folder)
    with readable_errors(place):
        # the commit of the first request, so that both are of the same one
        folder = _snapshot(HubId(place.repo_id, folder.name), weights)
    if missing := [name for name in weights if not (folder / name).exists()]:
        raise MqadaptError(f"{place}: the repository has no {missing[0]}; only safetensors models are supported")
    return folder


def fetch_companions(place: HubId) -> Path:
    """Download the files of a hub model other than its weights: configuration, index, tokenizer, licence.

    Raises:
        OSError: as `fetch`.
    """
    with readable_errors(place):
        return _snapshot(place, _COMPANIONS)


def fetch_config(src: Source) -> Path:
    """Return a local path with the `config.json` of a model; weights are not downloaded.

    Raises:
        OSError: as `fetch`.
    """
    return _fetch_some(src, ["config.json"])


def fetch_tokenizer(src: Source) -> Path:
    """Return a folder with the tokenizer files of a model.

    The tokenizer of a GGUF file is built from its metadata, in a temporary folder that exists until this process ends.

    Raises:
        MqadaptError: the GGUF file is malformed.
        OSError: as `fetch`.
    """
    path = _fetch_some(src, _TOKENIZER)
    return _folder_of_gguf(path.resolve()) if path.is_file() else path


@cache
def _folder_of_gguf(path: Path) -> Path:
    from mqadapt_rs._core import gguf_files

    folder = tempfile.TemporaryDirectory(prefix="mqadapt-")
    atexit.register(folder.cleanup)
    for name, content in gguf_files(path):
        (Path(folder.name) / name).write_bytes(content)
    return Path(folder.name)


def weight_files(folder: Path) -> list[str]:
    """Return the names of the weight files of a model, by the index in `folder` if there is one.

    Raises:
        MqadaptError: the index cannot be read, or names a file outside the folder.
    """
    index = folder / _INDEX
    if not index.exists():
        return [_WEIGHTS]
    try:
        shards = set(files.read_json(index, files.MAX_INDEX_BYTES)["weight_map"].values())
        outside = [name for name in shards if Path(name).name != name or name in {".", ".."}]
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        message = f"{index}: expected an object with a 'weight_map' of tensor names to file names ({error!r})"
        raise MqadaptError(message) from error
    if outside:
        message = f"{index}: 'weight_map' names {outside[0]!r}; expected the name of a file in the same folder"
        raise MqadaptError(message)
    return sorted(shards)


def _fetch_some(src: Source, patterns: Sequence[str]) -> Path:
    place = parse(src)
    if isinstance(place, Path):
        return place
    with readable_errors(place):
        return _snapshot(place, patterns)


def _snapshot(place: HubId, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars

    if not sys.stderr.isatty() and not are_progress_bars_disabled():
        disable_progress_bars()
    folder = snapshot_download(
        place.repo_id,
        revision=place.revision,
        allow_patterns=list(patterns),
        ignore_patterns=_SUBFOLDERS,
        library_name="mqadapt-rs",
    )
    return Path(folder)


@contextmanager
def readable_errors(place: HubId, what: str = "model") -> Iterator[None]:
    """Convert errors of the hub client into `OSError`s with a message of one line; `what` names the kind of repository."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        message = f"{place}: access must be granted on the hub first; then log in or set HF_TOKEN"
        raise PermissionError(message) from error
    except errors.RepositoryNotFoundError as error:
        message = f"{place}: the hub has no such {what} (or it is private: log in or set HF_TOKEN)"
        raise FileNotFoundError(message) from error
    except errors.RevisionNotFoundError as error:
        message = f"{place}: the {what} has no such revision"
        raise FileNotFoundError(message) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        message = f"{place}: not in the local cache, and the hub cannot be reached (offline, or no network)"
        raise FileNotFoundError(message) from error
    except errors.HFValidationError as error:
        message = f"{place}: not a hub id: {error}"
        raise FileNotFoundError(message) from error
    except MqadaptError:
        raise
    except Exception as error:  # the classes of connection errors depend on the HTTP client
        raise _connection_error(place, error) from error


def is_connection_error(error: Exception) -> bool:
    """Whether an error is of the network or the hub; its class depends on the HTTP library of the hub client."""
    module = type(error).__module__.split(".")[0]
    return isinstance(error, OSError) or module in {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}


def _connection_error(place: HubId, error: Exception) -> Exception:
    return ConnectionError(f"{place}: the download failed: {error}") if is_connection_error(error) else error
