"""Progress of a search on a terminal: finished plans, the best plan, remaining time. Written to stderr."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mqadapt_rs._core import Plan
from mqadapt_rs.readable import readable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mqadapt_rs.search.core.evaluation import Evaluation
    from mqadapt_rs.search.core.study import Watcher


@contextmanager
def live(source: Plan) -> Iterator[Watcher | None]:
    """A watcher that shows progress; `None` if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}", markup=False)]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("loading", total=None)

        def watch(
            evaluation: Evaluation, done: int, expected: int, best: Evaluation | None, seconds_left: float
        ) -> None:
            words = f"{evaluation.stage} | {in_time(seconds_left)} left"
            if best is not None:
                plan = Plan.from_layers(best.plan, source.layers).describe()
                words += f" | best {plan if len(plan) < 40 else plan[:37] + '...'}: {best.damage}"
            progress.update(task, completed=done, total=expected, description=readable(words))

        yield watch


def in_time(seconds: float) -> str:
    """Format a duration: `1:05:09`."""
    whole = round(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}" if whole >= 3600 else f"{whole // 60}:{whole % 60:02}"
    )
