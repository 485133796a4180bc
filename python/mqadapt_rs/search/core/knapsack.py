"""Exact solution of the multiple-choice knapsack: one choice per layer under a budget, damages added up.

In: for each layer its choices with cost and damage. Out: the choices of least total damage within the budget, by dynamic
programming over the cost, in units of the costs' common divisor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

UNITS = 20_000
"""Steps that costs are rounded up to where they share no useful divisor (times, odd byte counts)."""


class Choice(NamedTuple):
    """One choice of a layer."""

    cost: float
    damage: float


def solve(layers: Sequence[Sequence[Choice]], budget: float) -> tuple[int, ...] | None:
    """For each layer, the index of the choice that minimises the sum of damages with the sum of costs within the budget.

    `None` if not even the cheapest choices fit. Whole costs are exact; others are rounded up to 1/20000 of the largest
    total, so a solution never exceeds the budget. Ties go to the cheaper choice, then to the earlier one.
    """
    cheapest = math.fsum(min(choice.cost for choice in layer) for layer in layers)
    if cheapest > budget * (1 + 1e-12):
        return None
    largest = math.fsum(max(choice.cost for choice in layer) for layer in layers)
    unit = _unit([choice.cost for layer in layers for choice in layer], largest)
    capacity = min(math.floor(budget / unit + 1e-9), sum(_steps(max(c.cost for c in layer), unit) for layer in layers))
    best = np.zeros(capacity + 1)  # least damage of the layers so far, at exactly this cost or less
    taken = np.zeros((len(layers), capacity + 1), dtype=np.int32)
    for idx, layer in enumerate(layers):
        following = np.full(capacity + 1, np.inf)
        for which, choice in sorted(enumerate(layer), key=lambda item: (item[1].cost, item[0])):
            steps = _steps(choice.cost, unit)
            if steps > capacity:
                continue
            reached = np.full(capacity + 1, np.inf)
            reached[steps:] = best[: capacity + 1 - steps] + choice.damage
            better = reached < following
            following[better] = reached[better]
            taken[idx, better] = which
        best = following
    if not np.isfinite(best[capacity]):
        return None  # rounding up took the last bit of room
    left = int(np.argmin(best))  # the first of equals: the cheapest
    chosen = [0] * len(layers)
    for idx in range(len(layers) - 1, -1, -1):
        chosen[idx] = int(taken[idx, left])
        left -= _steps(layers[idx][chosen[idx]].cost, unit)
    return tuple(chosen)


def _unit(costs: Sequence[float], largest: float) -> float:
    if all(float(cost).is_integer() for cost in costs):
        divisor = math.gcd(*(int(cost) for cost in costs)) or 1
        if largest / divisor <= UNITS:
            return float(divisor)
    return largest / UNITS if largest > 0 else 1.0


def _steps(cost: float, unit: float) -> int:
    return math.ceil(cost / unit - 1e-9)
