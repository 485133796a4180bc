"""The prefix cache: hidden states from which later plans continue.

In: plans in the order of `in_order`, with their `branches`. Out: for each plan, the layer to start from and the states to keep.
The cache holds two kinds of states: those of a plan from which later plans branch off, and as many states of the source as fit,
since most plans begin as the source does. States of the source are dropped if the others need their memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mqadapt_rs.search.core.plan_order import shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mqadapt_rs.search.core.space import Layers

BRANCHES = 12
"""Largest number of states that a walk through a tree of up to 2**12 plans holds."""


@dataclass
class Prefixes:
    """Hidden states at the inputs of layers, by the plan of the layers before."""

    most: int
    """Largest number of states."""
    source: Layers
    """What the layers of the source cache."""
    trunk: dict[int, Any] = field(default_factory=dict)
    """States of the source, by their layer."""
    _states: dict[Layers, Any] = field(default_factory=dict)

    def clear(self) -> None:
        """Drop all states, for other documents."""
        self._states.clear()
        self.trunk.clear()

    def trunk_layers(self) -> list[int]:
        """The layers before which states of the source are kept: as many as fit, evenly spread."""
        layers = len(self.source)
        number = min(layers - 1, max(0, self.most))
        return _spread(layers, number)

    def way(self, plan: Layers, depths: Sequence[int]) -> tuple[int, Any, list[int]]:
        """The first layer that a plan has to run, the state at its input, and the layers before which to keep states.

        The state is the deepest one that the plan can continue from; without one, the layer is 0 and the state `None`.
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
        # the deepest states save the most work
        return start, state, wanted[-room:] if room > 0 else []

    def _thin(self, number: int) -> None:
        """Keep `number` states of the source, evenly spread."""
        layers = sorted(self.trunk)
        self.trunk = {layers[at]: self.trunk[layers[at]] for at in _spread(len(layers), number)}

    def keep(self, plan: Layers, depth: int, state: Any) -> None:
        """Keep a state of a plan; the shallowest states are dropped if there are too many."""
        if plan == self.source and depth in self.trunk_layers():
            self.trunk[depth] = state
        else:
            self._states[plan[:depth]] = state
        while self._states and len(self._states) > self.most - len(self.trunk):
            del self._states[min(self._states, key=len)]


def _spread(places: int, number: int) -> list[int]:
    """Choose `number` of the places 0 to `places - 1`, evenly spread."""
    return sorted({places * (step + 1) // (number + 1) for step in range(number)})
