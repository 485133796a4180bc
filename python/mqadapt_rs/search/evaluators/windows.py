"""The evaluator of windows of text: `kl` and `perplexity`.

In: a model and token windows. Out: one loss per window. A plan continues from the cached hidden states of the longest shared
prefix; the final hidden states of the source are computed once; final norm and `lm_head` run over vocabulary tiles, so that no
matrix of logits is stored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mqadapt_rs.search.core.space import Layers
    from mqadapt_rs.search.evaluators.overlays import PlanOverlays
    from mqadapt_rs.search.evaluators.prefix_cache import Prefixes


@dataclass
class WindowEvaluator:
    """Computes the losses of windows of equal length."""

    overlays: PlanOverlays
    windows: Sequence[Sequence[int]]
    """Token ids; every window has the same length."""
    metric: str
    """`kl` or `perplexity`."""
    prefixes: Prefixes
    _documents: range = range(0)
    _reference: Any = None

    def losses(
        self, plans: Sequence[Layers], branches: Sequence[Sequence[int]], documents: range
    ) -> Iterator[list[float]]:
        """Yield the mean loss of each window, in nats per token."""
        if documents != self._documents:
            self._documents, self._reference = documents, None
            self.prefixes.clear()
        windows = [list(self.windows[document]) for document in documents]
        if self.metric == "perplexity":
            for plan, depths in zip(plans, branches, strict=True):
                nll = self.overlays.source.nll(self._final(plan, depths, windows), windows)
                yield _means(nll.tolist(), len(windows))
            return
        source = self.prefixes.source
        changed = [(plan, depths) for plan, depths in zip(plans, branches, strict=True) if plan != source]
        if changed and self._reference is None:
            self._reference = self._final(source, (), windows)
        finals = [self._final(plan, depths, windows) for plan, depths in changed]
        divergences = iter(self.overlays.source.kl_divergences(self._reference, finals) if finals else ())
        for plan in plans:
            # the divergence of the source from itself is exactly 0
            yield [0.0] * len(windows) if plan == source else _means(next(divergences).tolist(), len(windows))

    def _final(self, plan: Layers, depths: Sequence[int], windows: list[list[int]]) -> Any:
        """The hidden states of a plan after the last layer; those at `depths` are cached."""
        model = self.overlays.model(plan)
        _, states, kept = self.prefixes.way(plan, depths)
        for depth in [*kept, len(plan)]:
            states = model.hidden_before(depth, windows) if states is None else model.forward_from(states, depth)
            if depth < len(plan):
                self.prefixes.keep(plan, depth, states)
        return states


def _means(values: Sequence[float], windows: int) -> list[float]:
    """The mean of the values of each window; all windows have equally many."""
    share = len(values) // windows
    return [math.fsum(values[index * share : (index + 1) * share]) / share for index in range(windows)]
