"""The model under any plan, in memory. In: a model loaded once, a merge method. Out: models that share all other weights.

A layer is merged once for every count; plans are put together from merged layers. Where a layer depends on those before it
(closed-form with a refit), every plan is merged as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mqadapt_rs import Calibration, Model
    from mqadapt_rs.search.core.space import Heads


@dataclass
class PlanOverlays:
    """A model's plans."""

    source: Model
    """The model as it is."""
    method: str
    seed: int
    calibration: Calibration | None = None
    """Of methods that merge from text."""
    together: bool = False
    """Whether what becomes of a layer depends on those before it."""
    _merged: dict[tuple[int, int], Model] = field(default_factory=dict)

    def model(self, plan: Heads) -> Model:
        """The model under a plan."""
        changed = [(idx, own) for idx, own in enumerate(plan) if own != self.source.plan.num_key_value_heads[idx]]
        if not changed:
            return self.source
        if self.together:
            return self._merge(plan)
        return self.source.with_layers_of([(layer_idx, self._layer(layer_idx, own)) for layer_idx, own in changed])

    def _layer(self, layer_idx: int, count: int) -> Model:
        """The model with one layer merged."""
        if (layer_idx, count) not in self._merged:
            plan = list(self.source.plan.num_key_value_heads)
            plan[layer_idx] = count
            self._merged[layer_idx, count] = self._merge(plan)
        return self._merged[layer_idx, count]

    def _merge(self, plan: Sequence[int]) -> Model:
        return self.source.with_plan(list(plan), self.method, self.seed, calibration=self.calibration)
