"""The plans that a search may choose from, and what each costs.

In: for each layer, what it may cache and the bytes that this takes per token. Out: the choices of each layer, costs, plans by
shape. A choice is opaque: it has bytes, a name, and a place in the order of the layer's choices.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from mqadapt_rs._core import LayerCache, Plan
from mqadapt_rs.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Layers = tuple[LayerCache, ...]
"""What every layer caches: a plan, as the search handles it."""


@dataclass(frozen=True)
class Space:
    """What the layers of the source cache, what they may cache instead, and the costs of both."""

    source: Layers
    """What each layer of the source caches."""
    layer_bytes: tuple[Mapping[LayerCache, int], ...]
    """For each layer, everything that it may cache with the bytes per token, ascending by bytes; the source's own is last."""
    allowed: Layers | None = None
    """The choices that plans may use beside the source's own; `None`: every legal one."""
    layer_seconds: tuple[Mapping[LayerCache, float], ...] | None = None
    """For each layer, the measured time that each choice takes of a decoded token."""

    def __post_init__(self) -> None:
        if not self.source or len(self.source) != len(self.layer_bytes):
            raise ArgumentError(
                f"{len(self.source)} layers with {len(self.layer_bytes)} tables of bytes: expected one for each of them"
            )
        if not any(len(self.choices(layer)) > 1 for layer in range(len(self.source))):
            wanted = "" if self.allowed is None else f" with {', '.join(map(str, self.allowed))}"
            names = ", ".join(sorted(map(str, set(self.source))))
            raise ArgumentError(f"nothing to search{wanted}: no layer of {names} can have fewer K/V heads")

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the model."""
        return len(self.source)

    @cached_property
    def _choices(self) -> tuple[Layers, ...]:
        allowed = None if self.allowed is None else set(self.allowed)
        return tuple(
            (*(choice for choice in table if choice != own and (allowed is None or choice in allowed)), own)
            for own, table in zip(self.source, self.layer_bytes, strict=True)
        )

    @cached_property
    def _ranks(self) -> tuple[dict[LayerCache, int], ...]:
        return tuple({choice: rank for rank, choice in enumerate(table)} for table in self.layer_bytes)

    def choices(self, layer_idx: int) -> Layers:
        """The choices of a layer, ascending by bytes; the last is the source's own."""
        return self._choices[layer_idx]

    def lower(self, layer_idx: int, choice: LayerCache) -> Layers:
        """The choices of a layer that take fewer bytes than `choice`, ascending."""
        choices = self._choices[layer_idx]
        return choices[: choices.index(choice)]

    def rank(self, plan: Layers) -> tuple[int, ...]:
        """The place of each layer's choice among all that the layer may cache: plans are ordered by it.

        Raises:
            KeyError: the plan is not one of this model.
        """
        return tuple(ranks[choice] for ranks, choice in zip(self._ranks, plan, strict=True))

    def kv_bytes(self, plan: Layers) -> int:
        """K/V bytes per token of a plan.

        Raises:
            KeyError: the plan is not one of this model.
        """
        return sum(table[choice] for table, choice in zip(self.layer_bytes, plan, strict=True))

    def seconds_of(self, layer_idx: int, choice: LayerCache) -> float:
        """Measured time of a layer with a choice, in seconds for each decoded token."""
        if self.layer_seconds is None:
            raise ArgumentError("no times were measured for this space of plans")
        return self.layer_seconds[layer_idx][choice]

    def with_layers(self, layers: Iterable[int], choice: LayerCache, base: Layers | None = None) -> Layers:
        """`base` (or the source) with `choice` in those of these layers that have it."""
        plan = list(self.source if base is None else base)
        for layer_idx in layers:
            if choice in self.choices(layer_idx):
                plan[layer_idx] = choice
        return tuple(plan)

    def last(self, number: int, choice: LayerCache) -> Layers:
        """The last `number` layers with a choice."""
        return self.with_layers(range(self.num_hidden_layers - number, self.num_hidden_layers), choice)

    def alternate(self, number: int, choice: LayerCache) -> Layers:
        """Every second layer from the end, `number` of them, with a choice."""
        return self.with_layers((self.num_hidden_layers - 1 - 2 * step for step in range(number)), choice)

    def single(self, layer_idx: int, choice: LayerCache) -> Layers:
        """One layer with a choice."""
        return self.with_layers((layer_idx,), choice)

    def reduced(self) -> Layers:
        """Every choice that some layer can be reduced to, ascending by its bytes in the layer where it takes fewest."""
        least: dict[LayerCache, int] = {}
        for layer_idx, table in enumerate(self.layer_bytes):
            for choice in self.choices(layer_idx)[:-1]:
                least[choice] = min(table[choice], least.get(choice, table[choice]))
        return tuple(sorted(least, key=lambda choice: (least[choice], str(choice))))

    def targets(self) -> Layers:
        """The choices that fixed patterns reduce layers to: those that were asked for, else the smallest."""
        return self.allowed or self.reduced()[:1]

    def smallest(self) -> int:
        """K/V bytes per token of the cheapest plan."""
        return self.kv_bytes(tuple(self.choices(layer)[0] for layer in range(self.num_hidden_layers)))

    def plan(self, layers: Layers) -> Plan:
        """The plan of this model in which the layers cache this."""
        return Plan.from_layers(layers, self.source)

    def describe(self, layers: Layers) -> str:
        """A plan in the grammar of `Plan.parse`: `keep`, or parts such as `mqa:0,3-7` joined by `;`."""
        return self.plan(layers).describe()


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
