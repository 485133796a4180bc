"""The journal: every evaluation is one line of JSON, on disk before the search goes on.

In: evaluations. Out: `journal.jsonl`, from which a killed search continues and from which figures and report are made.
The first line says what the losses depend on; a journal of another model, text, method or version is refused. Every line
ends in a checksum of what stands before. A line that a kill tore in half is cut off; damage anywhere else is an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from typing import TYPE_CHECKING, Any

from mqadapt_rs import files, json_document
from mqadapt_rs.errors import ArgumentError

from .evaluation import Evaluation, Metric

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from .space import Heads, Space

JOURNAL = "journal.jsonl"
FORMAT = 1
CHECKSUM = "blake2b_128"
"""The last field of a line: BLAKE2b (128 bits) of the others, but for the time that the evaluation took."""


class JournalError(ArgumentError):
    """A journal that cannot be continued: of another search, in use, or damaged."""


class Journal:
    """An open journal. Holds an exclusive lock on the file until it is closed."""

    def __init__(self, folder: Path, header: dict[str, Any], space: Space, metric: Metric, *, resume: bool) -> None:
        self.path = folder / JOURNAL
        self.space = space
        self.metric = metric
        self.header = {"journal": FORMAT, **header}
        exists = begun(folder, resume=resume)
        folder.mkdir(parents=True, exist_ok=True)
        self.file = files.open_regular(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            _lock(self.file.fileno(), self.path)
            self.evaluations = self._replay() if exists else {}
            if self.file.seek(0, os.SEEK_END) == 0:
                self._append(self.header)
                _sync_folder(folder)
        except BaseException:
            self.file.close()
            raise

    def _replay(self) -> dict[Heads, Evaluation]:
        """The evaluations that the file holds; a torn last line is cut off the file."""
        lines, whole = _lines(files.read_bytes(self.path, files.MAX_JOURNAL_BYTES))
        if not lines:
            self.file.truncate(0)  # killed while the first line was written
            return {}
        records = [_parse(self.path, number, line) for number, line in enumerate(lines, 1)]
        found = records[0]
        for key in dict.fromkeys([*self.header, *found]):
            if key != CHECKSUM and found.get(key) != self.header.get(key):
                raise JournalError(
                    f"{self.path} belongs to another search: its {key} is {found.get(key)!r}, this one's is "
                    f"{self.header.get(key)!r}; choose another folder"
                )
        _check(self.path, 1, found)
        self.file.truncate(whole)
        evaluations: dict[Heads, Evaluation] = {}
        source: tuple[float, ...] | None = None
        for number, record in enumerate(records[1:], 2):
            evaluation = self._evaluation(record, source, number)
            _check(self.path, number, record)
            source = evaluation.losses if source is None else source
            evaluations[evaluation.plan] = evaluation
        return evaluations

    def _evaluation(self, record: dict[str, Any], source: tuple[float, ...] | None, number: int) -> Evaluation:
        """What a line says; `source`: the losses of the first evaluation, unless this is it."""
        try:
            losses = finite(record["losses"])
            return Evaluation.of(
                self.space,
                self.metric,
                tuple(int(count) for count in record["plan"]),
                losses,
                losses if source is None else source,
                seconds=float(record["seconds"]),
                stage=str(record["stage"]),
                stopped=bool(record["stopped"]),
            )
        except (LookupError, TypeError, ValueError, ArithmeticError) as problem:
            raise JournalError(f"{self.path}, line {number}: not an evaluation ({problem})") from None

    def add(self, evaluation: Evaluation) -> None:
        """Writes an evaluation; it survives any kill once this returns."""
        self._append(record(evaluation, self.header))
        self.evaluations[evaluation.plan] = evaluation

    def _append(self, content: dict[str, Any]) -> None:
        line = {**content, CHECKSUM: _checksum(content)}
        self.file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Closes the file and lets others have it."""
        self.file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def finite(losses: Iterable[Any]) -> tuple[float, ...]:
    """The losses of a record.

    Raises:
        TypeError, ValueError, ArithmeticError: they are no numbers, one of them is infinite or NaN, or there are none.
    """
    found = tuple(float(loss) for loss in losses)
    if not found or not all(map(math.isfinite, found)):
        raise ValueError("expected finite losses, at least one")
    return found


def begun(folder: Path, *, resume: bool) -> bool:
    """Whether a folder has a journal.

    Raises:
        JournalError: it has one that is not to be resumed.
    """
    path = folder / JOURNAL
    exists = path.exists() and path.stat().st_size > 0
    if exists and not resume:
        raise JournalError(f"{path} exists: continue it with --resume, or choose another folder")
    return exists


def record(evaluation: Evaluation, header: dict[str, Any]) -> dict[str, Any]:
    """An evaluation as a line of the journal."""
    damage = evaluation.damage
    return {
        "plan": list(evaluation.plan),
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
    """The header and the evaluations of a journal, without changing or locking it.

    Raises:
        JournalError: there is none, or it is damaged.
    """
    path = folder / JOURNAL
    if not path.is_file():
        raise JournalError(f"{folder} holds no {JOURNAL}: expected the folder of a search")
    lines, _ = _lines(files.read_bytes(path, files.MAX_JOURNAL_BYTES))
    if not lines:
        raise JournalError(f"{path} is empty")
    records = [_parse(path, number, line) for number, line in enumerate(lines, 1)]
    if records[0].get("journal") != FORMAT:
        raise JournalError(
            f"{path} is not a journal of this version (format {records[0].get('journal')!r}, expected {FORMAT})"
        )
    for number, content in enumerate(records, 1):
        _check(path, number, content)
    return records[0], records[1:]


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file so that it is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(
            content, file, indent=None if "num_key_value_heads" in content and len(content) == 1 else 1, allow_nan=False
        )
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _lines(content: bytes) -> tuple[list[bytes], int]:
    """The lines that end in a newline, and the number of bytes that they take."""
    whole = content.rfind(b"\n") + 1
    return content[:whole].splitlines(), whole


def _parse(path: Path, number: int, line: bytes) -> dict[str, Any]:
    """The content of a line, its checksum still to be checked."""
    try:
        content = json_document.loads(line)
    except ValueError as problem:
        raise JournalError(f"{path}, line {number}: not JSON ({problem}); the file was damaged") from None
    if not isinstance(content, dict):
        raise JournalError(f"{path}, line {number}: expected an object, found {type(content).__name__}")
    return content


def _checksum(content: dict[str, Any]) -> str:
    """Of what a line says; numbers come back from JSON exactly as they were written."""
    said = {key: value for key, value in content.items() if key not in {CHECKSUM, "seconds"}}
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=16).hexdigest()


def _check(path: Path, number: int, content: dict[str, Any]) -> None:
    """Compares a line with its checksum, which it loses."""
    said = content.pop(CHECKSUM, None)
    if said is None:
        raise JournalError(
            f"{path}, line {number}: expected a checksum in '{CHECKSUM}'; this is not the journal of a search of this "
            "version, or the file was damaged: choose another folder"
        )
    if said != _checksum(content):
        raise JournalError(
            f"{path}, line {number}: its checksum says that it is not what was written; the file was damaged: remove this "
            "line and those behind it to evaluate them again"
        )


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise JournalError(f"{path} is in use by another search") from None


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def latest(records: list[dict[str, Any]]) -> dict[Heads, dict[str, Any]]:
    """The record of every plan; of a plan that was evaluated again, the last."""
    return {tuple(int(count) for count in record["plan"]): record for record in records}
