"""Overlays of plans in memory. In: a loaded model, a merge method. Out: models under plans, which share unchanged weights.

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
    """The overlays of a model."""

    source: Model
    """The unchanged model."""
    method: str
    seed: int
    calibration: Calibration | None = None
    """The calibration of the method, if it needs one."""
    together: bool = False
    """Whether the result for a layer depends on the layers before it."""
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
