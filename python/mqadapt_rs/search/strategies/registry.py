"""The registry of strategies. A new strategy is a file and an entry here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mqadapt_rs.search.strategies import alternate, budget, from_end, given, greedy, pareto, random_plans, sensitivity

if TYPE_CHECKING:
    from collections.abc import Callable

    from mqadapt_rs.search.core.options import Options
    from mqadapt_rs.search.core.space import Space
    from mqadapt_rs.search.core.study import Run


@dataclass(frozen=True)
class Strategy:
    """A search strategy."""

    summary: str
    run: Run
    uses: frozenset[str]
    """The fields of `Options` that the strategy uses, beside `counts`."""
    needs: tuple[str, ...] = ()
    """The fields of which the strategy needs one."""
    refuse: Callable[[Space, Options], None] | None = None
    """Raises `ArgumentError` for options that do not fit the model."""


STRATEGIES: dict[str, Strategy] = {
    "sensitivity": Strategy("each layer alone, reduced to every choice", sensitivity.run, frozenset()),
    "from-end": Strategy(
        "the last 2, 4, 8 ... layers, then the most layers within --max-damage", from_end.run, frozenset({"max_damage"})
    ),
    "alternate": Strategy("every second layer from the end, 2, 3 ... layers", alternate.run, frozenset({"max_damage"})),
    "greedy": Strategy(
        "repeatedly reduce the layer that adds the least damage per saved byte",
        greedy.run,
        frozenset({"kv_budget", "max_damage"}),
    ),
    "budget": Strategy(
        "exact knapsack within a budget, then swaps",
        budget.run,
        frozenset({"kv_budget", "latency_budget", "swaps"}),
        needs=("kv_budget", "latency_budget"),
    ),
    "pareto": Strategy(
        "the front of K/V bytes against damage", pareto.run, frozenset({"points", "swaps", "max_damage"})
    ),
    "given": Strategy(
        "the plans that --plan names, side by side",
        given.run,
        frozenset({"plans"}),
        needs=("plans",),
        refuse=given.refuse,
    ),
    "random": Strategy("random plans, as a baseline", random_plans.run, frozenset({"kv_budget", "trials"})),
}
