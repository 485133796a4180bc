"""Hidden states that later plans go on from.

In: plans in the order of `in_order`, with their `branches`. Out: for each, where to start and what to keep.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .space import Heads


@dataclass
class Prefixes:
    """States at the entrance of layers, by the plan of the layers before."""

    most: int
    """States that are kept at a time."""
    _states: dict[Heads, Any] = field(default_factory=dict)

    def clear(self) -> None:
        """Forgets all, because the documents change."""
        self._states.clear()

    def start(self, plan: Heads, depths: Sequence[int]) -> tuple[int, Any]:
        """The deepest kept state that a plan can go on from, with its layer; `(0, None)` if there is none.

        States that neither this plan nor a later one (`depths`: its branches) can use are dropped.
        """
        usable = {prefix: state for prefix, state in self._states.items() if plan[: len(prefix)] == prefix}
        self._states = {prefix: state for prefix, state in usable.items() if len(prefix) in depths}
        if not usable:
            return 0, None
        deepest = max(usable, key=len)
        return len(deepest), usable[deepest]

    def wanted(self, start: int, depths: Sequence[int]) -> list[int]:
        """The layers whose entrance should be kept by a run from `start`, ascending: the deepest that there is room for."""
        return sorted(depth for depth in depths if depth > start)[-self.most :] if self.most else []

    def keep(self, plan: Heads, depth: int, state: Any) -> None:
        """Keeps a state of a plan; of too many the shallowest go, which save least."""
        self._states[plan[:depth]] = state
        while len(self._states) > self.most:
            del self._states[min(self._states, key=len)]
