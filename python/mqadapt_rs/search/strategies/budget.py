"""`budget`: find the best plan within a budget of K/V bytes or latency.

An exact knapsack adds up the damages of single layers. Its solution and the fixed patterns of the same size are evaluated, and
a local search by swaps improves the best of them; every neighbour is evaluated as a complete plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mqadapt_rs.errors import ArgumentError
from mqadapt_rs.search.core.knapsack import Choice, solve
from mqadapt_rs.search.strategies import sensitivity

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mqadapt_rs._core import LayerCache
    from mqadapt_rs.search.core.limit import Limit
    from mqadapt_rs.search.core.options import Options
    from mqadapt_rs.search.core.space import Layers, Space
    from mqadapt_rs.search.core.study import Study

    Damages = Mapping[tuple[int, LayerCache], float]

SWAPS = 12
ROUNDS = 12
PATIENCE = 2
"""Number of rounds without progress after which local search ends."""


def single_damages(study: Study) -> dict[tuple[int, LayerCache], float]:
    """The damage of every layer alone at every choice; 0 for its own."""
    space = study.space
    singles = sensitivity.plans(study)
    damages = {(layer, space.source[layer]): 0.0 for layer in range(space.num_hidden_layers)}
    for evaluation in study.evaluate(singles, "sensitivity"):
        layer = next(idx for idx, own in enumerate(evaluation.plan) if own != space.source[idx])
        damages[layer, evaluation.plan[layer]] = evaluation.damage.mean
    return damages


def knapsack(space: Space, damages: Damages, limit: Limit) -> Layers | None:
    """The plan whose added damages are least within the limit; `None` if nothing fits."""
    layers = [
        [Choice(limit.layer_cost(layer, choice), damages[layer, choice]) for choice in space.choices(layer)]
        for layer in range(space.num_hidden_layers)
    ]
    chosen = solve(layers, limit.most)
    return None if chosen is None else tuple(space.choices(layer)[at] for layer, at in enumerate(chosen))


def patterns(space: Space, limit: Limit) -> list[Layers]:
    """The published patterns (from the end, every second layer, from the start) that just fit, for every choice."""
    found: dict[Layers, None] = {}
    layers = space.num_hidden_layers
    for choice in space.reduced():
        ends = [space.last(number, choice) for number in range(1, layers + 1)]
        starts = [space.with_layers(range(number), choice) for number in range(1, layers + 1)]
        # after every second layer, the others follow from the end
        alternate = [space.alternate(number, choice) for number in range(1, (layers + 1) // 2 + 1)]
        rest = [idx for idx in range(layers - 1, -1, -1) if (layers - 1 - idx) % 2]
        alternate += [space.with_layers(rest[:number], choice, alternate[-1]) for number in range(1, len(rest) + 1)]
        for shape in (ends, alternate, starts):
            fitting = next((plan for plan in shape if limit.fits(plan)), None)
            if fitting is not None:
                found[fitting] = None
    return list(found)


def neighbours(space: Space, plan: Layers, damages: Damages, limit: Limit) -> list[Layers]:
    """The plans within the limit that differ in one layer, or in two layers of which one grows and one shrinks.

    The plans are sorted by the sum of the damages of single layers.
    """
    options = [
        (layer, choice)
        for layer in range(space.num_hidden_layers)
        for choice in space.choices(layer)
        if choice != plan[layer]
    ]
    found: dict[Layers, float] = {}

    def consider(changes: tuple[tuple[int, LayerCache], ...]) -> None:
        changed = list(plan)
        for layer, choice in changes:
            changed[layer] = choice
        if limit.fits(tuple(changed)):
            gain = sum(damages[layer, choice] - damages[layer, plan[layer]] for layer, choice in changes)
            found.setdefault(tuple(changed), gain)

    def grows(layer: int, choice: LayerCache) -> bool:
        return space.layer_bytes[layer][choice] > space.layer_bytes[layer][plan[layer]]

    larger = [change for change in options if grows(*change)]
    smaller = [change for change in options if not grows(*change)]
    for change in options:
        consider((change,))
    for change in larger:
        for other in smaller:
            if change[0] != other[0]:
                consider((change, other))
    found.pop(space.source, None)
    return sorted(found, key=lambda candidate: (found[candidate], space.rank(candidate)))


def run(study: Study, options: Options) -> None:
    """Evaluate single layers, the knapsack solution and the patterns, then rounds of swaps until none improves."""
    limit, space = study.rule.limit, study.space
    if limit is None:
        raise ArgumentError("the strategy 'budget' needs --kv-budget or --latency-budget")
    swaps = SWAPS if options.swaps is None else options.swaps
    study.expect(len(sensitivity.plans(study)) + 4 + 2 * swaps)
    damages = single_damages(study)
    chosen = knapsack(space, damages, limit)
    if chosen is None:
        raise ArgumentError(limit.refusal())
    starts = [chosen, *patterns(space, limit)]
    study.expect(len(starts) + 2 * swaps)
    current = min(study.evaluate(starts, "start"), key=study.rule.key)
    tried, fruitless = {e.plan for e in study.evaluations}, 0
    for turn in range(1, ROUNDS + 1):
        candidates = [plan for plan in neighbours(space, current.plan, damages, limit) if plan not in tried][:swaps]
        if not candidates or fruitless == PATIENCE:
            break
        study.expect(2 * len(candidates))
        tried.update(candidates)
        found = study.race(candidates, f"swaps {turn}", against=[current])
        better = [e for e in found if not e.stopped and study.rule.key(e) < study.rule.key(current)]
        fruitless = 0 if better else fruitless + 1
        current = min([current, *better], key=study.rule.key)
