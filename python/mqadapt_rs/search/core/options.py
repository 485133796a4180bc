"""The options of strategies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mqadapt_rs.search.core.space import Layers


@dataclass(frozen=True)
class Options:
    """The options of strategies. Each strategy uses some (see `STRATEGIES`) and refuses the others."""

    counts: tuple[int, ...] | None = None
    """Numbers of K/V heads that layers may be reduced to; `None`: every legal one (from-end and alternate: the smallest)."""
    kv_budget: float | None = None
    """Limit of K/V bytes per token."""
    latency_budget: float | None = None
    """Limit of the latency of a decoded token, in seconds."""
    max_damage: float | None = None
    """Limit of the damage."""
    points: int | None = None
    """Number of points of the Pareto front."""
    swaps: int | None = None
    """Number of neighbours that local search evaluates per round."""
    trials: int | None = None
    """Number of random plans."""
    plans: tuple[Layers, ...] | None = None
    """The plans to evaluate."""
