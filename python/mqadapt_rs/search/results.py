"""A finished or running search as plots and report read it.

In: the folder of a search. Out: its evaluations and what they say about known patterns of layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mqadapt_rs import files

from .conduct import BEST, SUMMARY
from .evaluation import Evaluation, Metric
from .journal import JOURNAL, JournalError, latest, read
from .pareto import front
from .space import Space
from .study import Options, Rule

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Results:
    """The content of a search's folder."""

    folder: Path
    header: dict[str, Any]
    """The first line of the journal."""
    summary: dict[str, Any] | None
    """`summary.json`; `None` while the search runs."""
    space: Space
    metric: Metric
    evaluations: tuple[Evaluation, ...]
    """The source first."""

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Reads a folder.

        Raises:
            JournalError: it holds no journal, or a damaged one.
        """
        header, records = read(folder)
        path = folder / JOURNAL
        try:
            metric = Metric(header["metric"], header["unit"], header["damage_unit"], header["scale"])
            seconds = header["layer_seconds"] and tuple(tuple(map(tuple, layer)) for layer in header["layer_seconds"])
            space = Space(tuple(header["source"]), tuple(header["head_bytes"]), None, seconds)
            evaluations: list[Evaluation] = []
            for plan, record in latest(records).items():
                losses = [float(loss) for loss in record["losses"]]
                source = evaluations[0].losses if evaluations else losses
                seconds, stage, stopped = float(record["seconds"]), str(record["stage"]), bool(record["stopped"])
                evaluation = Evaluation.of(
                    space, metric, plan, losses, source, seconds=seconds, stage=stage, stopped=stopped
                )
                evaluations.append(evaluation)
        except (KeyError, TypeError, ValueError) as problem:
            raise JournalError(f"{path}: not the journal of a search ({problem!r})") from None
        if not evaluations or evaluations[0].plan != space.source:
            raise JournalError(f"{path}: no evaluation yet")
        summary = files.read_json(folder / SUMMARY) if (folder / SUMMARY).exists() else None
        return cls(folder, header, summary, space, metric, tuple(evaluations))

    @property
    def source(self) -> Evaluation:
        """The evaluation of the source."""
        return self.evaluations[0]

    @property
    def winner(self) -> Evaluation | None:
        """The evaluation of `best.plan.json`; `None` before the end, or where no plan met the rule."""
        facts = (self.summary or {}).get("winner")
        if facts is None or not (self.folder / BEST).exists():
            return None
        plan = tuple(facts["num_key_value_heads"])
        return next((evaluation for evaluation in self.evaluations if evaluation.plan == plan), None)

    @property
    def rule(self) -> Rule:
        """What made one plan better than another."""
        return Rule.of(self.space, Options(**self.header["options"]))

    @property
    def whole(self) -> list[Evaluation]:
        """The evaluations that were not stopped early."""
        return [evaluation for evaluation in self.evaluations if not evaluation.stopped]

    def singles(self) -> dict[int, dict[int, Evaluation]]:
        """For each count, the evaluations of single layers by their index."""
        found: dict[int, dict[int, Evaluation]] = {}
        for evaluation in self.whole:
            changed = [idx for idx, own in enumerate(evaluation.plan) if own != self.space.source[idx]]
            if len(changed) == 1:
                found.setdefault(evaluation.plan[changed[0]], {})[changed[0]] = evaluation
        return found

    def pattern(self, name: str) -> dict[int, dict[int, Evaluation]]:
        """For each count, the evaluations of `last` or `alternate` layers by their number."""
        by_plan = {evaluation.plan: evaluation for evaluation in self.whole}
        layers = self.space.num_hidden_layers
        found: dict[int, dict[int, Evaluation]] = {}
        for count in self.space.reduced():
            for number in range(1, layers + 1 if name == "last" else (layers + 1) // 2 + 1):
                plan = getattr(self.space, name)(number, count)
                if plan in by_plan and plan != self.space.source:
                    found.setdefault(count, {})[number] = by_plan[plan]
        return found

    def front(self) -> list[Evaluation]:
        """The evaluations that no other one beats in both K/V bytes and damage."""
        return front(self.whole)

    def share(self, evaluation: Evaluation) -> float:
        """K/V bytes of a plan as a percentage of the source's."""
        return 100 * evaluation.kv_bytes / self.source.kv_bytes

    @property
    def title(self) -> str:
        """Model and method."""
        return f"{self.header.get('name', self.header.get('model', '?'))}, {self.header['method']}"
