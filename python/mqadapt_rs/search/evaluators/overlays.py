"""The model under any plan, in memory. In: a model loaded once, a merge method. Out: models that share all other weights.

A layer is merged once for every choice; plans are put together from merged layers. Where a layer depends on those before it
(a refit), every plan is merged as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mqadapt_rs._core import Plan

if TYPE_CHECKING:
    from mqadapt_rs import Calibration, Model
    from mqadapt_rs._core import LayerCache
    from mqadapt_rs.search.core.space import Layers


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
    _merged: dict[tuple[int, LayerCache], Model] = field(default_factory=dict)
    _own: Layers = field(init=False)
    """What the layers of the source cache."""

    def __post_init__(self) -> None:
        self._own = tuple(self.source.plan.layers)

    def model(self, plan: Layers) -> Model:
        """The model under a plan."""
        changed = [(idx, own) for idx, own in enumerate(plan) if own != self._own[idx]]
        if not changed:
            return self.source
        if self.together:
            return self._merge(plan)
        return self.source.with_layers_of([(layer_idx, self._layer(layer_idx, own)) for layer_idx, own in changed])

    def _layer(self, layer_idx: int, choice: LayerCache) -> Model:
        """The model with one layer merged."""
        if (layer_idx, choice) not in self._merged:
            plan = (*self._own[:layer_idx], choice, *self._own[layer_idx + 1 :])
            self._merged[layer_idx, choice] = self._merge(plan)
        return self._merged[layer_idx, choice]

    def _merge(self, plan: Layers) -> Model:
        return self.source.with_plan(
            Plan.from_layers(plan, self._own), self.method, self.seed, calibration=self.calibration
        )
