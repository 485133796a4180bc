"""What an evaluator is and what it answers.

In: a plan and a range of documents. Out: one loss per document, lower is better, so that plans are compared document by
document; the metric turns losses into the number that people know.
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
    """How losses read: the metric's name, its units, and how much worse than the source a plan is."""

    name: str
    """As on the command line: `kl`, `perplexity`, `predicted`, `task:NAME/METRIC`."""
    unit: str
    """Unit of the value."""
    damage_unit: str
    """Unit of the damage: the mean difference of losses to the source's."""
    scale: str = "identity"
    """How the value follows from the mean loss: `identity`, `exp`, or `negative` (a score, higher is better)."""

    def value(self, mean: float, error: float | None) -> tuple[float, float | None]:
        """The metric's value and its standard error from those of the loss."""
        if self.scale == "exp":
            value = math.exp(min(mean, 700.0))
            return value, None if error is None else value * error  # delta method
        return (-mean if self.scale == "negative" else mean), error


@dataclass(frozen=True)
class Evaluation:
    """One plan, evaluated."""

    plan: Layers
    rank: tuple[int, ...]
    """The place of the plan in the order of plans, by which ties are broken."""
    losses: tuple[float, ...]
    """One per document, in the evaluator's order; fewer than there are where the evaluation was stopped early."""
    value: float
    standard_error: float | None
    damage: Difference
    """Loss minus the source's on the same documents."""
    kv_bytes: int
    seconds: float
    stage: str = ""
    """What the search was doing: `source`, `step 3`, ..."""
    stopped: bool = False
    """Whether it was given up before the last document, being worse than another plan."""

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
        """The evaluation that these losses amount to; `source`: the source's losses on at least the same documents."""
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
    """Evaluates plans on documents. One lives in each worker; it keeps whatever helps the next call."""

    def losses(
        self, plans: Sequence[Layers], branches: Sequence[Sequence[int]], documents: range
    ) -> Iterator[list[float]]:
        """The losses of each plan on these documents.

        Args:
            plans: the plans; those before them in the order were asked for earlier, perhaps of another worker.
            branches: for each plan, the layers before which a later plan will take over its hidden states.
            documents: indices of documents.
        """
        ...


class EvaluatorSpec(Protocol):
    """What workers build their evaluator from: small, picklable, hashable, the same in every process."""

    @property
    def metric(self) -> Metric:
        """The metric of the losses."""
        ...

    @property
    def documents(self) -> int:
        """Documents that there are; 0 where losses do not come from documents (one loss for all)."""
        ...

    @property
    def group(self) -> int:
        """Plans that go to a worker together."""
        ...

    def fingerprints(self) -> dict[str, str]:
        """What the losses depend on beside the plan: model, text, method, version."""
        ...

    def build(self) -> Evaluator:
        """Loads what is needed. Called once in each worker."""
        ...
