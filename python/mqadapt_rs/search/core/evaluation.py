"""Evaluators and evaluations.

In: a plan and a range of documents. Out: one loss per document, lower is better, so that plans are compared document by
document. The metric converts losses into its usual value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mqadapt_rs.search.core.statistics import Difference, mean_and_error, paired

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mqadapt_rs.search.core.space import Layers, Space


@dataclass(frozen=True)
class Metric:
    """The name and the units of a metric, and how its value follows from losses."""

    name: str
    """The name on the command line: `kl`, `perplexity`, `predicted`, `task:NAME/METRIC`."""
    unit: str
    """Unit of the value."""
    damage_unit: str
    """Unit of the damage: the mean difference to the losses of the source."""
    scale: str = "identity"
    """How the value follows from the mean loss: `identity`, `exp`, or `negative` (a score, higher is better)."""

    def value(self, mean: float, error: float | None) -> tuple[float, float | None]:
        """The value of the metric and its standard error, from those of the loss."""
        if self.scale == "exp":
            value = math.exp(min(mean, 700.0))
            return value, None if error is None else value * error  # delta method
        return (-mean if self.scale == "negative" else mean), error


@dataclass(frozen=True)
class Evaluation:
    """The evaluation of one plan."""

    plan: Layers
    rank: tuple[int, ...]
    """The place of the plan in the order of plans, by which ties are broken."""
    losses: tuple[float, ...]
    """One per document, in the order of the evaluator; fewer if the evaluation was stopped early."""
    value: float
    standard_error: float | None
    damage: Difference
    """Loss minus loss of the source on the same documents."""
    kv_bytes: int
    seconds: float
    stage: str = ""
    """The stage of the search: `source`, `step 3`, ..."""
    stopped: bool = False
    """Whether the evaluation was stopped early, since the plan is worse than another one."""

    @classmethod
    def of(
        cls,
        space: Space,
        metric: Metric,
        plan: Layers,
        losses: Sequence[float],
        source: Sequence[float],
        *,
        seconds: float,
        stage: str,
        stopped: bool = False,
    ) -> Evaluation:
        """The evaluation of a plan by its losses; `source` are the losses of the source on at least the same documents."""
        mean, error = mean_and_error(losses)
        value, value_error = metric.value(mean, error)
        damage = paired(losses, source[: len(losses)])
        return cls(
            plan=plan,
            rank=space.rank(plan),
            losses=tuple(losses),
            value=value,
            standard_error=value_error,
            damage=damage,
            kv_bytes=space.kv_bytes(plan),
            seconds=seconds,
            stage=stage,
            stopped=stopped,
        )


class Evaluator(Protocol):
    """Evaluates plans on documents. Each worker has one, which keeps state between calls."""

    def losses(
        self, plans: Sequence[Layers], branches: Sequence[Sequence[int]], documents: range
    ) -> Iterator[list[float]]:
        """The losses of each plan on these documents.

        Args:
            plans: the plans; those before them in the order were evaluated earlier, maybe by another worker.
            branches: for each plan, the layers before which a later plan will reuse its hidden states.
            documents: indices of documents.
        """
        ...


class EvaluatorSpec(Protocol):
    """The specification from which each worker builds its evaluator: small, picklable, hashable."""

    @property
    def metric(self) -> Metric:
        """The metric of the losses."""
        ...

    @property
    def documents(self) -> int:
        """The number of documents; 0 if losses are not of documents (one loss in total)."""
        ...

    @property
    def group(self) -> int:
        """The number of plans that a worker gets together."""
        ...

    def fingerprints(self) -> dict[str, str]:
        """Everything that the losses depend on except the plan: model, text, method, version."""
        ...

    def build(self) -> Evaluator:
        """Load model and data. Called once in each worker."""
        ...
