"""A limit that plans must keep: K/V bytes, or time of a decoded token. Both add up over layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mqadapt_rs._core import LayerCache
    from mqadapt_rs.search.core.space import Layers, Space


@dataclass(frozen=True)
class Limit:
    """Most of one cost."""

    space: Space
    most: float
    """K/V bytes per token, or seconds."""
    latency: bool = False
    """Whether the cost is time."""

    def layer_cost(self, layer_idx: int, choice: LayerCache) -> float:
        """The cost of a layer with a choice."""
        if self.latency:
            return self.space.seconds_of(layer_idx, choice)
        return self.space.layer_bytes[layer_idx][choice]

    def cost(self, plan: Layers) -> float:
        """The cost of a plan."""
        return sum(self.layer_cost(layer, choice) for layer, choice in enumerate(plan))

    def fits(self, plan: Layers) -> bool:
        """Whether a plan keeps the limit."""
        return self.cost(plan) <= self.most * (1 + 1e-9)

    def smallest(self) -> float:
        """The least that any plan costs."""
        space = self.space
        return sum(
            min(self.layer_cost(layer, c) for c in space.choices(layer)) for layer in range(space.num_hidden_layers)
        )

    def said(self, cost: float) -> str:
        """A cost in words."""
        return f"{1e3 * cost:.3f} ms per decoded token" if self.latency else f"{cost:,.0f} K/V bytes per token"

    def refusal(self) -> str:
        """Why no plan fits."""
        return (
            f"no plan fits {self.said(self.most)}: the smallest has {self.said(self.smallest())}, the source "
            f"{self.said(self.cost(self.space.source))}"
        )
