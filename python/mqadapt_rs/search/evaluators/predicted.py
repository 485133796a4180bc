"""The evaluator of the metric `predicted`, which is computed from calibration statistics without a forward pass.

In: statistics of a calibration text, a merge method. Out: one loss per plan: the lost share of the energy of the attention
output, summed over layers. Layers are treated as independent and equally important: a first estimate for models that are too
large to evaluate, and a baseline for measured metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mqadapt_rs.search.core.evaluation import Metric

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mqadapt_rs import Calibration
    from mqadapt_rs._core import LayerCache
    from mqadapt_rs.search.core.space import Layers

METRIC = Metric(
    "predicted", "lost share of attention output, over layers", "lost share of attention output, summed over layers"
)


@dataclass
class PredictedEvaluator:
    """Sums the predictions of layers, each computed once."""

    src: str
    method: str
    calibration: Calibration
    source: Layers
    _lost: dict[tuple[int, LayerCache], float] = field(default_factory=dict)

    def losses(
        self, plans: Sequence[Layers], branches: Sequence[Sequence[int]], documents: range
    ) -> Iterator[list[float]]:
        """Yield one loss per plan; there are no documents."""
        del branches, documents
        changed = [
            [(layer_idx, own) for layer_idx, own in enumerate(plan) if own != self.source[layer_idx]] for plan in plans
        ]
        missing = list(dict.fromkeys(layer for layers in changed for layer in layers if layer not in self._lost))
        if missing:
            errors = self.calibration.predicted_errors(self.src, self.method, missing)
            self._lost.update(zip(missing, (error**2 for error in errors), strict=True))
        for layers in changed:
            yield [sum(self._lost[layer] for layer in layers)]
