"""`random`: evaluate random plans, as a baseline for other strategies."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mqadapt_rs.search.core.limit import Limit
    from mqadapt_rs.search.core.options import Options
    from mqadapt_rs.search.core.space import Layers, Space
    from mqadapt_rs.search.core.study import Study

TRIALS = 32


def draw(space: Space, draws: random.Random, limit: Limit | None) -> Layers:
    """Draw a plan. With a limit, layers in random order get a random lower choice until the plan fits."""
    if limit is None:
        return tuple(draws.choice(space.choices(layer)) for layer in range(space.num_hidden_layers))
    plan = list(space.source)
    while not limit.fits(tuple(plan)):
        layer = draws.choice([idx for idx, own in enumerate(plan) if space.lower(idx, own)])
        plan[layer] = draws.choice(space.lower(layer, plan[layer]))
    return tuple(plan)


def run(study: Study, options: Options) -> None:
    """Draw different plans and evaluate them; with a budget, a race may stop some early."""
    space, trials = study.space, TRIALS if options.trials is None else options.trials
    limit = study.rule.limit
    draws = random.Random(study.seed)
    plans: dict[Layers, None] = {}
    for _ in range(20 * trials):  # a small space has fewer plans than trials
        plan = draw(space, draws, limit)
        if plan != space.source:
            plans[plan] = None
        if len(plans) == trials:
            break
    study.expect(len(plans))
    if limit is None:
        study.evaluate(plans, "random")
    else:
        study.race(plans, "random")
