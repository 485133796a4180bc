"""The order in which plans are evaluated so that what they share is computed once.

Two plans that agree up to layer L have the same hidden states at its entrance. Plans are leaves of the tree of those
prefixes; walking it depth first, largest subtree last, runs every edge once and holds at most log2(plans) hidden
states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mqadapt_rs.search.core.space import Heads


def shared(a: Heads, b: Heads) -> int:
    """The number of leading layers in which two plans agree."""
    for layer, (x, y) in enumerate(zip(a, b, strict=True)):
        if x != y:
            return layer
    return len(a)


def in_order(plans: Sequence[Heads]) -> list[Heads]:
    """The plans without repetition, in the order of a depth-first walk that holds few hidden states."""

    def walk(group: list[Heads], depth: int) -> list[Heads]:
        while len(group) > 1:
            children: dict[int, list[Heads]] = {}
            for plan in group:
                children.setdefault(plan[depth], []).append(plan)
            depth += 1
            if len(children) == 1:
                continue
            ordered = sorted(children.items(), key=lambda child: (len(child[1]), child[0]))
            return [plan for _, subtree in ordered for plan in walk(subtree, depth)]
        return group

    return walk(sorted(set(plans)), 0)


def branches(plans: Sequence[Heads]) -> list[tuple[int, ...]]:
    """For each plan of a sequence, ascending: the layers before which a later plan takes over its hidden states."""
    depths: list[tuple[int, ...]] = [()] * len(plans)
    later: set[int] = set()
    for index in range(len(plans) - 2, -1, -1):
        here = shared(plans[index], plans[index + 1])
        # beyond `here` nothing later agrees with this plan; before it, what the next plan shares this one shares too
        later = {depth for depth in later if depth <= here} | {here}
        depths[index] = tuple(sorted(later - {0}))
    return depths
