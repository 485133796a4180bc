"""`pareto`: find the front of K/V bytes against damage.

The knapsack solutions for a ladder of budgets are evaluated as complete plans, then the neighbours of the points of the front.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mqadapt_rs.search.core.limit import Limit
from mqadapt_rs.search.core.pareto_front import front
from mqadapt_rs.search.strategies import sensitivity
from mqadapt_rs.search.strategies.budget import knapsack, neighbours, single_damages

if TYPE_CHECKING:
    from mqadapt_rs.search.core.options import Options
    from mqadapt_rs.search.core.study import Study

POINTS = 12


def run(study: Study, options: Options) -> None:
    """Evaluate the ladder, then `swaps` neighbours of every point of the front (by default one)."""
    space = study.space
    points = POINTS if options.points is None else options.points
    swaps = 1 if options.swaps is None else options.swaps
    study.expect(len(sensitivity.plans(study)) + points * (1 + swaps))
    damages = single_damages(study)
    low, high = space.smallest(), space.kv_bytes(space.source)
    budgets = [low + (high - low) * step / points for step in range(points)]
    found = [knapsack(space, damages, Limit(space, budget)) for budget in budgets]
    ladder = [plan for plan in found if plan is not None]
    study.expect(points * (1 + swaps))
    study.evaluate([plan for plan in dict.fromkeys(ladder) if plan != space.source], "ladder")
    tried = {evaluation.plan for evaluation in study.evaluations}
    around = []
    for point in front(study.evaluations):
        if point.plan != space.source:
            nearby = [
                plan
                for plan in neighbours(space, point.plan, damages, Limit(space, point.kv_bytes))
                if plan not in tried
            ]
            around += nearby[:swaps]
            tried.update(nearby[:swaps])
    # plans of different size do not compete, so none is stopped early
    study.evaluate(around, "neighbours")
