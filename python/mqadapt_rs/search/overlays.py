"""The model under any plan, in memory. In: a model loaded once, a merge method. Out: models that share all other weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mqadapt_rs import Model

    from .space import Heads


@dataclass
class PlanOverlays:
    """Plans of methods that merge each layer by itself."""

    source: Model
    """The model as it is."""
    method: str
    seed: int

    def model(self, plan: Heads) -> Model:
        """The model under a plan."""
        if list(plan) == self.source.plan.num_key_value_heads:
            return self.source
        return self.source.with_plan(list(plan), self.method, self.seed)
