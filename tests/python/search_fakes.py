"""Evaluators with known answers, importable by worker processes."""

from __future__ import annotations

import itertools
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mqadapt_rs._core import LayerCache
from mqadapt_rs.search import Evaluator, Layers, Metric
from mqadapt_rs.search.core import plan_record
from mqadapt_rs.search.core.plan_record import counts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

LAYERS, HEADS = 8, 4
ONE, TWO, FOUR = LayerCache(1), LayerCache(2), LayerCache(4)
SPACE = plan_record.space((HEADS,) * LAYERS, (64,) * LAYERS)
WEIGHTS = (9.0, 1.0, 2.5, 0.5, 3.0, 0.25, 0.75, 1.5)  # of one head less, by layer


def additive(plan: Layers) -> float:
    """Damage that adds up over layers: the knapsack is exact."""
    return sum(w * (HEADS - own) for w, own in zip(WEIGHTS, counts(plan), strict=True))


def interacting(plan: Layers) -> float:
    """Neighbouring changed layers hurt each other: the knapsack is misled."""
    changed = [own != FOUR for own in plan]
    return additive(plan) + 4.0 * sum(a and b for a, b in itertools.pairwise(changed))


def coupled(plan: Layers) -> float:
    """The two layers that look cheapest alone must not both change."""
    return additive(plan) + 20.0 * (plan[3] != FOUR and plan[5] != FOUR)


def undefined(plan: Layers) -> float:
    """No number for every plan but the source."""
    return 0.0 if set(plan) == {FOUR} else float("nan")


FUNCTIONS = {"additive": additive, "interacting": interacting, "coupled": coupled, "undefined": undefined}


@dataclass(frozen=True)
class FakeSpec:
    """Losses are the plan's damage plus noise of the document, plus noise of plan and document."""

    function: str = "additive"
    documents: int = 24
    noise: float = 0.0
    group: int = 2
    log: str = ""
    """A file that gets a line for each evaluation; workers may be asked to die by `<log>.kill`."""
    pause: float = 0.0
    name: str = "fake"

    @property
    def metric(self) -> Metric:
        return Metric("kl", "nats per token", "nats per token")

    def fingerprints(self) -> dict[str, str]:
        return {"model": self.name, "text": "none", "method": "mean", "version": "1"}

    def build(self) -> Evaluator:
        return Fake(self)


class Fake:
    def __init__(self, spec: FakeSpec) -> None:
        self.spec = spec

    def losses(
        self, plans: Sequence[Layers], branches: Sequence[Sequence[int]], documents: range
    ) -> Iterator[list[float]]:
        assert len(branches) == len(plans)
        for plan in plans:
            if self.spec.log:
                with Path(self.spec.log).open("a") as log:
                    log.write(f"{os.getpid()} {counts(plan)} {documents.start} {documents.stop}\n")
                kill = Path(self.spec.log + ".kill")
                if kill.exists():
                    try:
                        kill.unlink()
                    except FileNotFoundError:
                        pass  # another worker takes the bullet
                    else:
                        os._exit(9)
            time.sleep(self.spec.pause)
            mean = FUNCTIONS[self.spec.function](plan)
            yield [mean + self._noise(plan, doc) for doc in documents]

    def _noise(self, plan: Layers, document: int) -> float:
        if not self.spec.noise:
            return 0.0
        common = random.Random(f"document {document}").gauss(0, 10 * self.spec.noise)
        return common + random.Random(f"{tuple(counts(plan))} {document}").gauss(0, self.spec.noise)
