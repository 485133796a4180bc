"""Output of the commands: tables for people, JSON for programs, progress bars on a terminal.

Names from outside are printed without control characters and never interpreted as markup. JSON, and text that another program
reads, is exact.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mqadapt_rs.readable import for_json, for_terminal, readable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.progress import Progress, TaskID
    from rich.table import Table

_DELAY = 1.0  # seconds before progress is shown
_UNITS = {"calibrate": "layers"}
"""What phases count that count something else than the rest of their command."""


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout."""
    is_unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    document = json.dumps(value, indent=2, ensure_ascii=not is_unicode, default=str)
    sys.stdout.write(for_json(document) + "\n")


def print_text(text: str) -> None:
    """Print text and a line break on stdout: without control characters on a terminal, exactly elsewhere."""
    sys.stdout.write((for_terminal(text) if sys.stdout.isatty() else text) + "\n")


def _table(title: str, **options: Any) -> Table:
    """An empty table whose title is plain text."""
    from rich.table import Table
    from rich.text import Text

    return Table(title=Text(readable(title)), title_justify="left", **options)


def _print(table: Table) -> None:
    from rich.console import Console

    Console(markup=False, emoji=False).print(table)


def print_table(title: str, rows: Mapping[str, object]) -> None:
    """Print names and values, one pair per line."""
    table = _table(title, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(readable(name), readable(value))
    _print(table)


def print_columns(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: the first column is text, the others are numbers."""
    table = _table(title)
    for index, name in enumerate(header):
        table.add_column(readable(name), justify="right" if index else "left")
    for row in rows:
        table.add_row(*map(readable, row))
    _print(table)


def in_bytes(count: float) -> str:
    """A size in decimal units: `1.5 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def in_runs(counts: Sequence[int]) -> str:
    """K/V heads by ranges of layers: `0-21: 3, 22-29: 1`."""
    parts: list[str] = []
    start = 0
    for index in range(1, len(counts) + 1):
        if index == len(counts) or counts[index] != counts[start]:
            span = str(start) if index - 1 == start else f"{start}-{index - 1}"
            parts.append(f"{span}: {counts[start]}")
            start = index
    return ", ".join(parts)


class _Bars:
    """A progress callback that shows a bar for each phase, after a second of work."""

    def __init__(self, progress: Progress, unit: str) -> None:
        self._progress = progress
        self._unit = unit
        self._tasks: dict[str, TaskID] = {}
        self._start = time.monotonic()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._progress.add_task(phase, total=total, unit=_UNITS.get(phase, self._unit))
        self._progress.update(self._tasks[phase], completed=done, total=total)
        if not self._progress.live.is_started and time.monotonic() - self._start > _DELAY:
            self._progress.start()


@contextmanager
def progress_bars(unit: str) -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress callback that shows bars on stderr, or `None` if stderr is not a terminal. `unit` names what phases count."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.text import Text

    class Amount(ProgressColumn):
        size, speed, count = DownloadColumn(), TransferSpeedColumn(), MofNCompleteColumn()

        def render(self, task: Task) -> Text:
            if task.fields["unit"] == "bytes":
                return Text.assemble(self.size.render(task), " ", self.speed.render(task))
            return Text.assemble(self.count.render(task), " ", task.fields["unit"])

    columns = [TextColumn("{task.description}", markup=False), BarColumn(), Amount(), TimeRemainingColumn()]
    progress = Progress(*columns, console=Console(stderr=True), transient=True)
    try:
        yield _Bars(progress, unit)
    finally:
        if progress.live.is_started:
            progress.stop()
