"""Hidden states that later plans go on from.

In: plans in the order of `in_order`, with their `branches`. Out: for each, where to start and what to keep.
States of two kinds are kept: on the way of a plan, those that later plans branch off from; and on the way of the source,
which runs anyway, as many as there is room for, since most plans begin as the source does. They make room for the others
where these are needed: not in a study of single layers whose every beginning is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mqadapt_rs.search.core.plan_order import shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mqadapt_rs.search.core.space import Layers

BRANCHES = 12
"""States that the walk through a tree of plans holds at most, up to 2**12 plans."""


@dataclass
class Prefixes:
    """States at the entrance of layers, by the plan of the layers before."""

    most: int
    """States that are kept at a time."""
    source: Layers
    """What the layers of the source cache."""
    trunk: dict[int, Any] = field(default_factory=dict)
    """States of the source, by their layer."""
    _states: dict[Layers, Any] = field(default_factory=dict)

    def clear(self) -> None:
        """Forgets all, because the documents change."""
        self._states.clear()
        self.trunk.clear()

    def trunk_layers(self) -> list[int]:
        """The layers before which the source's states are kept: as many as there is room for, evenly spread."""
        layers = len(self.source)
        number = min(layers - 1, max(0, self.most))
        return _spread(layers, number)

    def way(self, plan: Layers, depths: Sequence[int]) -> tuple[int, Any, list[int]]:
        """The layer from which a plan runs, the kept state there, and the layers before which it should keep states.

        The state is the deepest that the plan can go on from; layer 0 and `None` if there is none.

        States that neither this plan nor a later one (`depths`: its branches) can use are dropped.
        """
        if plan == self.source and not self.trunk:
            return 0, None, self.trunk_layers()
        usable = {prefix: state for prefix, state in self._states.items() if plan[: len(prefix)] == prefix}
        self._states = {prefix: state for prefix, state in usable.items() if len(prefix) in depths}
        common = shared(plan, self.source)
        found = [(depth, state) for depth, state in self.trunk.items() if depth <= common]
        found += [(len(prefix), state) for prefix, state in usable.items()]
        start, state = max(found, key=lambda kept: kept[0], default=(0, None))
        wanted = sorted(depth for depth in depths if depth > start)
        if wanted and len(self.trunk) > max(0, self.most - BRANCHES):
            self._thin(max(0, self.most - BRANCHES))
        room = self.most - len(self.trunk)
        # the deepest, which save most
        return start, state, wanted[-room:] if room > 0 else []

    def _thin(self, number: int) -> None:
        """Leaves so many of the source's states, evenly spread."""
        layers = sorted(self.trunk)
        self.trunk = {layers[at]: self.trunk[layers[at]] for at in _spread(len(layers), number)}

    def keep(self, plan: Layers, depth: int, state: Any) -> None:
        """Keeps a state of a plan; of too many the shallowest go."""
        if plan == self.source and depth in self.trunk_layers():
            self.trunk[depth] = state
        else:
            self._states[plan[:depth]] = state
        while self._states and len(self._states) > self.most - len(self.trunk):
            del self._states[min(self._states, key=len)]


def _spread(places: int, number: int) -> list[int]:
    """So many of the places 0 to `places - 1`, evenly spread."""
    return sorted({places * (step + 1) // (number + 1) for step in range(number)})
