"""The plans that a search may choose from, and what each costs.

In: the K/V heads of the source and what one head costs in each layer. Out: legal counts, costs, plans by shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mqadapt_rs.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Heads = tuple[int, ...]
"""K/V heads of every layer: a plan, as the search handles it."""


@dataclass(frozen=True)
class Space:
    """The source's K/V heads per layer, the K/V bytes of one head, and the counts that may be used."""

    source: Heads
    """`num_key_value_heads` of every layer of the source."""
    head_bytes: tuple[int, ...]
    """Bytes that one K/V head of a layer adds to the cache with every token."""
    counts: tuple[int, ...] | None = None
    """The counts that plans may use beside the source's own; `None`: every legal one."""
    layer_seconds: tuple[tuple[tuple[int, float], ...], ...] | None = None
    """For each layer, its counts with the time that it then takes of a decoded token, where that was measured."""

    def __post_init__(self) -> None:
        if not self.source or len(self.source) != len(self.head_bytes):
            raise ArgumentError(
                f"{len(self.source)} layers with {len(self.head_bytes)} head sizes: expected one for each of them"
            )
        if not any(len(self.choices(layer)) > 1 for layer in range(len(self.source))):
            wanted = "" if self.counts is None else f" with the counts {', '.join(map(str, self.counts))}"
            raise ArgumentError(
                f"nothing to search{wanted}: no layer of K/V heads {sorted(set(self.source))} can have fewer"
            )

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the model."""
        return len(self.source)

    def choices(self, layer_idx: int) -> tuple[int, ...]:
        """The counts that a layer may have, ascending; the last is the source's own."""
        own = self.source[layer_idx]
        allowed = range(1, own) if self.counts is None else sorted(set(self.counts))
        return (*(count for count in allowed if 0 < count < own and own % count == 0), own)

    def kv_bytes(self, plan: Sequence[int]) -> int:
        """K/V bytes per token of a plan."""
        return sum(count * size for count, size in zip(plan, self.head_bytes, strict=True))

    def seconds_of(self, layer_idx: int, count: int) -> float:
        """Measured time of a layer with so many heads, in seconds for each decoded token."""
        if self.layer_seconds is None:
            raise ArgumentError("no times were measured for this space of plans")
        return dict(self.layer_seconds[layer_idx])[count]

    def with_layers(self, layers: Iterable[int], count: int, base: Heads | None = None) -> Heads:
        """`base` (or the source) with `count` heads in these layers, where they can have so many."""
        plan = list(self.source if base is None else base)
        for layer_idx in layers:
            if count in self.choices(layer_idx):
                plan[layer_idx] = count
        return tuple(plan)

    def last(self, number: int, count: int) -> Heads:
        """The last `number` layers with `count` heads."""
        return self.with_layers(range(self.num_hidden_layers - number, self.num_hidden_layers), count)

    def alternate(self, number: int, count: int) -> Heads:
        """Every second layer from the end, `number` of them, with `count` heads."""
        return self.with_layers((self.num_hidden_layers - 1 - 2 * step for step in range(number)), count)

    def single(self, layer_idx: int, count: int) -> Heads:
        """One layer with `count` heads."""
        return self.with_layers((layer_idx,), count)

    def reduced(self) -> tuple[int, ...]:
        """Every count that some layer can be reduced to, ascending."""
        return tuple(sorted({c for layer in range(self.num_hidden_layers) for c in self.choices(layer)[:-1]}))

    def smallest(self) -> int:
        """K/V bytes per token of the cheapest plan."""
        return self.kv_bytes([self.choices(layer)[0] for layer in range(self.num_hidden_layers)])


def parse_budget(text: str | float, full: float, what: str = "K/V bytes per token") -> float:
    """A budget in units of `full` (`"50%"`, or a fraction below 1 such as `0.5`) or as an amount (`4096`).

    Raises:
        ArgumentError: it is not a positive number, or more than `full`.
    """
    try:
        written = str(text).strip()
        number = float(written.removesuffix("%"))
        budget = number / 100 * full if written.endswith("%") else number * full if number < 1 else number
    except ValueError:
        raise ArgumentError(f"'{text}' is not a budget: expected a share such as '50%' or a number of {what}") from None
    if not (math.isfinite(budget) and 0 < budget <= full * (1 + 1e-9)):
        raise ArgumentError(
            f"a budget of '{text}' is {budget:g} {what}: expected more than 0 and at most {full:g}, the source's"
        )
    return budget


def describe(plan: Heads, source: Heads) -> str:
    """A plan in the grammar of `Plan.parse`: `keep`, or parts such as `mqa:0,3-7` joined by `;`."""
    parts = []
    for count in sorted({own for own, full in zip(plan, source, strict=True) if own != full}):
        layers = [idx for idx, (own, full) in enumerate(zip(plan, source, strict=True)) if own == count != full]
        runs: list[list[int]] = []
        for layer in layers:
            if runs and runs[-1][1] == layer - 1:
                runs[-1][1] = layer
            else:
                runs.append([layer, layer])
        spelled = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
        parts.append(f"{'mqa' if count == 1 else f'gqa{count}'}:{spelled}")
    return "; ".join(parts) or "keep"
