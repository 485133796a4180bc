"""Text from a data set of the Hugging Face hub. In: `org/name[@revision][:folder or file]`. Out: its documents.

Files are read (`.txt`, `.jsonl`, `.json`, plain or `.gz`, and `.parquet`), loading scripts are never run. In a data set with
splits, the training files are read, the smallest first, and only as many as are needed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mqadapt_rs import text
from mqadapt_rs.errors import MqadaptError
from mqadapt_rs.sources import hub

if TYPE_CHECKING:
    from collections.abc import Iterator

_ID = re.compile(r"(?P<repo_id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[\w./-]+))?(?::(?P<part>[^:]+))?", re.ASCII)
_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
_NO_TEXT = {"dataset_infos.json", "requirements.txt"}


class DatasetId(NamedTuple):
    """A data set of the hub, or a part of it."""

    place: hub.HubId
    part: str | None
    """A folder or a file; a configuration is a folder on the hub."""


def parse(name: str) -> DatasetId | None:
    """Parse the name of a data set; `None` if the text is something else, such as a path that does not exist."""
    match = _ID.fullmatch(name)
    if match is None or (match["part"] is None and name.endswith(_SUFFIXES)) or Path(name).parent.exists():
        return None
    return DatasetId(hub.HubId(match["repo_id"], match["revision"]), match["part"])


def documents(dataset: DatasetId, field: str) -> Iterator[str]:
    """Yield the documents of a data set; each file is downloaded into the cache of the hub when it is needed.

    Raises:
        FileNotFoundError: there is no such data set, or it has no text file.
        MqadaptError: a record has no text in `field`, or a file needs a library that is not installed.
        OSError: the hub cannot be reached or refuses the request.
    """
    from huggingface_hub import HfApi, hf_hub_download

    place = dataset.place
    with hub.readable_errors(place, "data set"):
        about = HfApi(library_name="mqadapt-rs").dataset_info(
            place.repo_id, revision=place.revision, files_metadata=True
        )
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in about.siblings or []}
    for name in choose(sizes, dataset):
        with hub.readable_errors(place, "data set"):
            file = hf_hub_download(
                place.repo_id, name, repo_type="dataset", revision=about.sha, library_name="mqadapt-rs"
            )
        yield from _documents(Path(file), name, field)


def choose(sizes: dict[str, int], dataset: DatasetId) -> list[str]:
    """Choose the files to read, in order: those of the named part, and of the training split if there is one.

    Raises:
        FileNotFoundError: there is no such file.
    """
    names = [name for name in sizes if name.endswith(_SUFFIXES) and Path(name).name not in _NO_TEXT]
    if (part := dataset.part) is not None:
        part = part.strip("/")
        names = [name for name in names if name == part or name.startswith((f"{part}/", f"data/{part}/"))]
    names = [name for name in names if re.search(r"(^|[/_.-])train", name)] or names
    folders = [name.rpartition("/")[0] for name in names]
    # one of several configurations, which may be languages
    names = [name for name, folder in zip(names, folders, strict=True) if folder == min(folders)]
    if not names:
        of = f" below '{dataset.part}'" if dataset.part else ""
        raise FileNotFoundError(
            f"{dataset.place}: the data set has no text{of} ({', '.join(_SUFFIXES)}); found {', '.join(sorted(sizes)[:8])}"
        )
    return sorted(names, key=lambda name: (sizes[name], name))


def _documents(file: Path, name: str, field: str) -> Iterator[str]:
    # the hub's cache may name a file by its hash, so what it is follows from its name in the data set
    if name.endswith(".parquet"):
        yield from _parquet(file, name, field)
    elif ".txt" in Path(name).suffixes:
        yield text.read_plain(file, name.endswith(".gz"))
    else:
        yield from text.read_records(file, field, name.endswith(".gz"))


def _parquet(file: Path, name: str, field: str) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MqadaptError(f"{name}: reading parquet needs pyarrow: pip install 'mqadapt-rs[eval]'") from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        if field not in columns:
            raise MqadaptError(f"{name}: no column '{field}' ({text.ANOTHER_FIELD}); found {', '.join(columns)}")
        for batch in table.iter_batches(batch_size=256, columns=[field]):
            for value in batch.column(0).to_pylist():
                if not isinstance(value, str):
                    raise MqadaptError(f"{name}: column '{field}' holds {type(value).__name__}, expected text")
                yield value
    except pyarrow.ArrowException as error:
        raise MqadaptError(f"{name}: {error}") from error
