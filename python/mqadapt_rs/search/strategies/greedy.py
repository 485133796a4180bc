"""`greedy`: repeatedly reduce the layer that adds the least damage per saved byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mqadapt_rs.search.core.options import Options
    from mqadapt_rs.search.core.space import Layers
    from mqadapt_rs.search.core.study import Study


def moves(study: Study, base: Layers) -> list[Layers]:
    """The plans that take one layer of `base` to its next lower choice."""
    found = []
    for layer, own in enumerate(base):
        lower = study.space.lower(layer, own)
        if lower:
            found.append((*base[:layer], lower[-1], *base[layer + 1 :]))
    return found


def run(study: Study, options: Options) -> None:
    """Reduce layers until the plan fits the K/V budget, the damage exceeds its limit, or no layer can be reduced."""
    base, current, limit = study.space.source, study.source, study.rule.limit
    for step in range(1, 1 + sum(len(study.space.choices(layer)) - 1 for layer in range(len(base)))):
        candidates = moves(study, base)
        if not candidates or (limit is not None and limit.fits(base)):
            break
        study.expect(len(candidates) * (len(candidates) + 1) // 2)
        # damage per saved byte decides, so a race is valid only for plans that save equally many bytes
        saved = {current.kv_bytes - study.space.kv_bytes(plan) for plan in candidates}
        stage = f"step {step}"
        found = study.race(candidates, stage) if len(saved) == 1 else study.evaluate(candidates, stage)
        before = current
        current = min(
            (evaluation for evaluation in found if not evaluation.stopped),
            key=lambda e: ((e.damage.mean - before.damage.mean) / (before.kv_bytes - e.kv_bytes), e.rank),
        )
        base = current.plan
        if options.max_damage is not None and current.damage.mean > options.max_damage:
            break
