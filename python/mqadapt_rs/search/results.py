"""The results of a finished or running search, for plots and report.

In: the folder of a search. Out: its evaluations, also by patterns of layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import fields as fields_of
from typing import TYPE_CHECKING, Any

from mqadapt_rs import files
from mqadapt_rs.search.core import plan_record
from mqadapt_rs.search.core.evaluation import Evaluation, Metric
from mqadapt_rs.search.core.journal import BEST, JOURNAL, SUMMARY, JournalError, finite, latest, read
from mqadapt_rs.search.core.options import Options
from mqadapt_rs.search.core.pareto_front import front
from mqadapt_rs.search.core.study import Rule

if TYPE_CHECKING:
    from pathlib import Path

    from mqadapt_rs._core import LayerCache
    from mqadapt_rs.search.core.space import Space

MOST_LAYERS, MOST_HEADS = 1 << 14, 1 << 12
"""Limits that exceed every model."""


@dataclass(frozen=True)
class Results:
    """The content of the folder of a search."""

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
        """Read a folder.

        Raises:
            JournalError: the folder holds no journal, or the journal or the summary is damaged.
        """
        header, records = read(folder)
        path = folder / JOURNAL
        try:
            check(header)
            metric = Metric(header["metric"], header["unit"], header["damage_unit"], header["scale"])
            seconds = header["layer_seconds"] and plan_record.read_seconds(header["layer_seconds"])
            space = plan_record.space(header["source"], header["head_bytes"], None, seconds)
            evaluations: list[Evaluation] = []
            for plan, record in latest(records).items():
                losses = finite(record["losses"])
                legal = zip(plan, space.layer_bytes, strict=True)
                if not all(choice in table for choice, table in legal):
                    raise ValueError(f"the plan {plan_record.counts(plan)} is not one of this model")
                source = evaluations[0].losses if evaluations else losses
                seconds, stage, stopped = float(record["seconds"]), str(record["stage"]), bool(record["stopped"])
                evaluation = Evaluation.of(
                    space, metric, plan, losses, source, seconds=seconds, stage=stage, stopped=stopped
                )
                evaluations.append(evaluation)
                if not math.isfinite(seconds):
                    raise ValueError("expected finite seconds")
        except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as problem:
            raise JournalError(f"{path}: not the journal of a search ({problem!r})") from None
        if not evaluations or evaluations[0].plan != space.source:
            raise JournalError(f"{path}: no evaluation yet")
        return cls(folder, header, _summary(folder), space, metric, tuple(evaluations))

    @property
    def source(self) -> Evaluation:
        """The evaluation of the source."""
        return self.evaluations[0]

    @property
    def winner(self) -> Evaluation | None:
        """The evaluation of `best.plan.json`; `None` before the end, or if no plan met the rule."""
        facts = (self.summary or {}).get("winner")
        if facts is None or not (self.folder / BEST).exists():
            return None
        plan = plan_record.layers(facts["num_key_value_heads"])
        return next((evaluation for evaluation in self.evaluations if evaluation.plan == plan), None)

    @property
    def rule(self) -> Rule:
        """The rule that ranks plans."""
        return Rule.of(self.space, Options(**self.header["options"]))

    @property
    def whole(self) -> list[Evaluation]:
        """The complete evaluations."""
        return [evaluation for evaluation in self.evaluations if not evaluation.stopped]

    def singles(self) -> dict[LayerCache, dict[int, Evaluation]]:
        """For each choice, ascending, the evaluations of single layers by their index."""
        found: dict[LayerCache, dict[int, Evaluation]] = {}
        for evaluation in self.whole:
            changed = [idx for idx, own in enumerate(evaluation.plan) if own != self.space.source[idx]]
            if len(changed) == 1:
                found.setdefault(evaluation.plan[changed[0]], {})[changed[0]] = evaluation
        return {choice: found[choice] for choice in self.space.reduced() if choice in found}

    def pattern(self, name: str) -> dict[LayerCache, dict[int, Evaluation]]:
        """For each choice, ascending, the evaluations of `last` or `alternate` layers by their number."""
        by_plan = {evaluation.plan: evaluation for evaluation in self.whole}
        layers = self.space.num_hidden_layers
        found: dict[LayerCache, dict[int, Evaluation]] = {}
        for choice in self.space.reduced():
            for number in range(1, layers + 1 if name == "last" else (layers + 1) // 2 + 1):
                plan = getattr(self.space, name)(number, choice)
                if plan in by_plan and plan != self.space.source:
                    found.setdefault(choice, {})[number] = by_plan[plan]
        return found

    def front(self) -> list[Evaluation]:
        """The Pareto front of K/V bytes and damage."""
        return front(self.whole)

    def share(self, evaluation: Evaluation) -> float:
        """K/V bytes of a plan as a percentage of the source's."""
        return 100 * evaluation.kv_bytes / self.source.kv_bytes

    @property
    def title(self) -> str:
        """Model and method."""
        return f"{self.header.get('name', self.header.get('model', '?'))}, {self.header['method']}"


def check(header: dict[str, Any]) -> None:
    """Validate the first line of a journal: later code relies on its types and sizes.

    Raises:
        LookupError, TypeError, ValueError: a field is missing or invalid.
    """

    def expect(name: str, what: str, fits: bool) -> None:
        if not fits:
            raise ValueError(f"'{name}' must be {what}; found {header.get(name)!r}")

    def numbers(value: object, most: int) -> bool:
        return isinstance(value, list) and all(type(number) is int and 0 < number <= most for number in value)

    for name in ("metric", "unit", "damage_unit", "scale", "strategy", "method"):
        expect(name, "a text", isinstance(header[name], str))
    expect("name", "a text", isinstance(header.get("name", ""), str))
    source, sizes = header["source"], header["head_bytes"]
    expect("source", "the K/V heads of every layer", numbers(source, MOST_HEADS) and 0 < len(source) <= MOST_LAYERS)
    expect("head_bytes", "a size for every layer", numbers(sizes, 1 << 40) and len(sizes) == len(source))
    expect("documents", "a whole number", type(header["documents"]) is int and header["documents"] >= 0)
    rate = header.get("error_rate")
    expect("error_rate", "a number from 0 to 1", rate is None or (_is_number(rate) and 0 <= rate <= 1))
    seconds = header["layer_seconds"]
    times = seconds is None or (
        len(seconds) == len(source)
        and all(type(count) is int and _is_number(time) for layer in seconds for count, time in layer)
    )
    expect("layer_seconds", "the times of every layer's counts", times)
    options, known = header["options"], {field.name for field in fields_of(Options)}
    expect("options", "an object of options", isinstance(options, dict) and set(options) <= known)
    for name, value in options.items():
        plans = name == "plans" and isinstance(value, list) and all(numbers(plan, MOST_HEADS) for plan in value)
        counts = name == "counts" and numbers(value, MOST_HEADS)
        if not (plans or counts or _is_number(value)):
            raise ValueError(f"the option '{name}' cannot be {value!r}")
        if plans and any(len(plan) != len(source) for plan in value):
            raise ValueError("a plan has another number of layers than the model")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _summary(folder: Path) -> dict[str, Any] | None:
    """Read `summary.json`; `None` if there is none."""
    path = folder / SUMMARY
    if not path.exists():
        return None
    try:
        summary = files.read_json(path)
        winner = summary["winner"]
        if not isinstance(summary["verdict"], str) or not (winner is None or winner["num_key_value_heads"]):
            raise ValueError("expected a verdict, and a winner with its plan")
        if winner is not None:
            plan_record.layers(winner["num_key_value_heads"])
    except (LookupError, TypeError, ValueError, ArithmeticError) as problem:
        raise JournalError(
            f"{path}: not the summary of a search ({problem!r}); 'mqadapt search --resume' writes it again"
        ) from None
    return dict(summary)
