"""Limits of plans: K/V bytes, or latency of a decoded token. Both add up over layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mqadapt_rs._core import LayerCache
    from mqadapt_rs.search.core.space import Layers, Space


@dataclass(frozen=True)
class Limit:
    """The limit of one cost."""

    space: Space
    most: float
    """K/V bytes per token, or seconds."""
    latency: bool = False
    """Whether the cost is latency."""

    def layer_cost(self, layer_idx: int, choice: LayerCache) -> float:
        """The cost of a layer with a choice."""
        if self.latency:
            return self.space.seconds_of(layer_idx, choice)
        return self.space.layer_bytes[layer_idx][choice]

    def cost(self, plan: Layers) -> float:
        """The cost of a plan."""
        return sum(self.layer_cost(layer, choice) for layer, choice in enumerate(plan))

    def fits(self, plan: Layers) -> bool:
        """Whether a plan is within the limit."""
        return self.cost(plan) <= self.most * (1 + 1e-9)

    def smallest(self) -> float:
        """The cost of the cheapest plan."""
        space = self.space
        return sum(
            min(self.layer_cost(layer, c) for c in space.choices(layer)) for layer in range(space.num_hidden_layers)
        )

    def in_words(self, cost: float) -> str:
        """A cost in words."""
        return f"{1e3 * cost:.3f} ms per decoded token" if self.latency else f"{cost:,.0f} K/V bytes per token"

    def refusal(self) -> str:
        """The error message if no plan fits."""
        return (
            f"no plan fits {self.in_words(self.most)}: the smallest has {self.in_words(self.smallest())}, the source "
            f"{self.in_words(self.cost(self.space.source))}"
        )
