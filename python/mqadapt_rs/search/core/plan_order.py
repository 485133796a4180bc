"""The order of evaluation in which shared prefixes of plans are computed once.

Two plans that agree up to layer L have the same hidden states at the input of L. Plans are the leaves of the tree of these
prefixes; a depth-first walk with the largest subtree last computes every edge once and holds at most log2(plans) hidden states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Rank = tuple[int, ...]


def shared(a: Sequence[object], b: Sequence[object]) -> int:
    """The number of leading layers in which two plans agree."""
    for layer, (x, y) in enumerate(zip(a, b, strict=True)):
        if x != y:
            return layer
    return len(a)


def in_order(ranks: Iterable[Rank]) -> list[Rank]:
    """Ranks of plans without repetition, in the order of a depth-first walk that holds few hidden states."""

    def walk(group: list[Rank], depth: int) -> list[Rank]:
        while len(group) > 1:
            children: dict[int, list[Rank]] = {}
            for rank in group:
                children.setdefault(rank[depth], []).append(rank)
            depth += 1
            if len(children) == 1:
                continue
            ordered = sorted(children.items(), key=lambda child: (len(child[1]), child[0]))
            return [rank for _, subtree in ordered for rank in walk(subtree, depth)]
        return group

    return walk(sorted(set(ranks)), 0)


def branches(plans: Sequence[Sequence[object]]) -> list[tuple[int, ...]]:
    """For each plan of a sequence, in ascending order, the layers before which a later plan reuses its hidden states."""
    depths: list[tuple[int, ...]] = [()] * len(plans)
    later: set[int] = set()
    for index in range(len(plans) - 2, -1, -1):
        here = shared(plans[index], plans[index + 1])
        # no later plan agrees with this one beyond `here`; before it, this plan shares what the next one shares
        later = {depth for depth in later if depth <= here} | {here}
        depths[index] = tuple(sorted(later - {0}))
    return depths
