"""The journal of a search: each evaluation is one line of JSON, which is on disk before the search continues.

In: evaluations. Out: `journal.jsonl`, from which an interrupted search resumes and figures and report are made. The first line
holds everything that the losses depend on; a journal of another model, text, method or version is refused. An incomplete last
line is removed. Each line ends with its number and a checksum: a damaged line and all lines after it are discarded.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from typing import TYPE_CHECKING, Any

from mqadapt_rs import files, json_document, output_files
from mqadapt_rs.errors import ArgumentError
from mqadapt_rs.search.core import plan_record
from mqadapt_rs.search.core.evaluation import Evaluation, Metric

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from mqadapt_rs.search.core.space import Layers, Space

JOURNAL = "journal.jsonl"
BEST = "best.plan.json"
"""The winning plan of a search, beside its journal."""
SUMMARY = "summary.json"
"""The result of a search, beside its journal."""
FORMAT = 2
_NUMBER = "line"
_CHECKSUM = "line_blake2b"
_END = len(f', "{_CHECKSUM}": "0123456789abcdef"}}')


class JournalError(ArgumentError):
    """A journal cannot be continued: it is of another search, in use, or damaged."""


class Journal:
    """An open journal. Holds an exclusive lock on the file until it is closed."""

    def __init__(self, folder: Path, header: dict[str, Any], space: Space, metric: Metric, *, resume: bool) -> None:
        self.path = folder / JOURNAL
        self.space = space
        self.metric = metric
        self.header = {"journal": FORMAT, **header}
        exists = begun(folder, resume=resume)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = output_files.open_own(self.path)
        self.lines = 0
        try:
            _lock(self.file.fileno(), self.path)
            self.evaluations = self._replay() if exists else {}
            if self.file.seek(0, os.SEEK_END) == 0:
                self._append(self.header)
                output_files.sync_folder(folder)
        except BaseException:
            self.file.close()
            raise

    def _replay(self) -> dict[Layers, Evaluation]:
        """Read the evaluations of the file, and truncate it before the first incomplete or damaged line."""
        records, whole = _records(self.path, files.read_bytes(self.path, files.MAX_JOURNAL_BYTES))
        if not records:
            self.file.truncate(0)  # interrupted while the first line was written
            return {}
        found = records[0]
        for key in dict.fromkeys([*self.header, *found]):
            if found.get(key) != self.header.get(key):
                raise JournalError(
                    f"{self.path} belongs to another search: its {key} is {found.get(key)!r}, this one's is "
                    f"{self.header.get(key)!r}; choose another folder"
                )
        self.file.truncate(whole)
        self.lines = len(records)
        evaluations: dict[Layers, Evaluation] = {}
        source: tuple[float, ...] | None = None
        for number, record in enumerate(records[1:], 2):
            evaluation = self._evaluation(record, source, number)
            source = evaluation.losses if source is None else source
            evaluations[evaluation.plan] = evaluation
        return evaluations

    def _evaluation(self, record: dict[str, Any], source: tuple[float, ...] | None, number: int) -> Evaluation:
        """The evaluation of a line; `source` are the losses of the first evaluation, `None` for that itself."""
        try:
            losses = finite(record["losses"])
            return Evaluation.of(
                self.space,
                self.metric,
                plan_record.layers(record["plan"]),
                losses,
                losses if source is None else source,
                seconds=float(record["seconds"]),
                stage=str(record["stage"]),
                stopped=bool(record["stopped"]),
            )
        except (LookupError, TypeError, ValueError, ArithmeticError) as problem:
            raise JournalError(f"{self.path}, line {number}: not an evaluation ({problem})") from None

    def add(self, evaluation: Evaluation) -> None:
        """Append an evaluation; it is on disk when this returns."""
        self._append(record(evaluation, self.header))
        self.evaluations[evaluation.plan] = evaluation

    def _append(self, content: dict[str, Any]) -> None:
        self.file.write(numbered(content, self.lines))
        self.lines += 1
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the file and release its lock."""
        self.file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def finite(losses: Iterable[Any]) -> tuple[float, ...]:
    """Parse the losses of a record.

    Raises:
        TypeError, ValueError, ArithmeticError: a loss is not a finite number, or there is none.
    """
    found = tuple(float(loss) for loss in losses)
    if not found or not all(map(math.isfinite, found)):
        raise ValueError("expected finite losses, at least one")
    return found


def begun(folder: Path, *, resume: bool) -> bool:
    """Whether a folder has a journal.

    Raises:
        JournalError: the folder has a journal, and `resume` is false.
    """
    path = folder / JOURNAL
    exists = os.path.lexists(path) and path.lstat().st_size > 0
    if exists and not resume:
        raise JournalError(f"{path} exists: continue it with --resume, or choose another folder")
    return exists


def record(evaluation: Evaluation, header: dict[str, Any]) -> dict[str, Any]:
    """The fields of an evaluation in the journal."""
    damage = evaluation.damage
    return {
        "plan": plan_record.counts(evaluation.plan),
        "stage": evaluation.stage,
        "method": header["method"],
        "metric": header["metric"],
        "value": evaluation.value,
        "standard_error": evaluation.standard_error,
        "damage": damage.mean,
        "damage_standard_error": damage.standard_error,
        "documents": len(evaluation.losses),
        "stopped": evaluation.stopped,
        "kv_bytes_per_token": evaluation.kv_bytes,
        "seconds": round(evaluation.seconds, 4),
        "fingerprint": header["fingerprint"],
        "losses": list(evaluation.losses),
    }


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the header and the evaluations of a journal, without changing or locking it.

    Raises:
        JournalError: there is no journal, or it is damaged.
    """
    path = folder / JOURNAL
    if not path.is_file():
        raise JournalError(f"{folder} holds no {JOURNAL}: expected the folder of a search")
    records, _ = _records(path, files.read_bytes(path, files.MAX_JOURNAL_BYTES))
    if not records:
        raise JournalError(f"{path} is empty")
    return records[0], records[1:]


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    indent = None if "num_key_value_heads" in content and len(content) == 1 else 1
    output_files.write(path, (json.dumps(content, indent=indent, allow_nan=False) + "\n").encode())


def numbered(content: dict[str, Any], number: int, *, allow_nan: bool = False) -> bytes:
    """Format a line of a journal; the first has number 0."""
    line = f'{json.dumps(content, allow_nan=allow_nan)[:-1]}, "{_NUMBER}": {number}'.encode()
    return line + _end(line)


def _end(line: bytes) -> bytes:
    return f', "{_CHECKSUM}": "{hashlib.blake2b(line, digest_size=8).hexdigest()}"}}\n'.encode()


def _records(path: Path, content: bytes) -> tuple[list[dict[str, Any]], int]:
    """Parse the lines of a journal up to the first incomplete or damaged one; also returns their size in bytes.

    Raises:
        JournalError: the first line is damaged or has another format.
    """
    records: list[dict[str, Any]] = []
    whole = 0
    lines = [line + b"\n" for line in content.split(b"\n")[:-1]]
    for number, line in enumerate(lines):
        record = _checked(line, number)
        if record is None and number == 0:
            raise JournalError(_unreadable(path, line))
        if record is None:
            after = len(lines) - number - 1
            warnings.warn(
                f"{path}, line {number + 1}: damaged (wrong checksum); this line and the {after} lines after it are discarded",
                UserWarning,
                stacklevel=2,
            )
            break
        records.append(record)
        whole += len(line)
    return records, whole


def _checked(line: bytes, number: int) -> dict[str, Any] | None:
    """Parse a line; `None` if its checksum or its number is wrong."""
    text = line[: -_END - 1]
    if _end(text) != line[len(text) :]:
        return None
    try:
        record: dict[str, Any] = json_document.loads(text + b"}")
    except ValueError:
        return None
    return record if record.pop(_NUMBER, None) == number else None


def _unreadable(path: Path, line: bytes) -> str:
    """The reason why the first line is refused."""
    try:
        found = json_document.loads(line)["journal"]
    except (ValueError, LookupError, TypeError):
        found = FORMAT
    if found != FORMAT:
        return (
            f"{path} is not a journal of this version (format {found!r}, expected {FORMAT}: its lines have checksums); "
            "choose another folder"
        )
    return f"{path}, line 1: damaged (wrong checksum); choose another folder"


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # this system has no such locks
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise JournalError(f"{path} is in use by another search") from None


def latest(records: list[dict[str, Any]]) -> dict[Layers, dict[str, Any]]:
    """The latest record of each plan."""
    return {plan_record.layers(record["plan"]): record for record in records}
