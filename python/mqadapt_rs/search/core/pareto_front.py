"""The Pareto front. In: evaluations. Out: those that no other one beats in both K/V bytes and damage."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from mqadapt_rs.search.core.evaluation import Evaluation


def front(evaluations: Iterable[Evaluation]) -> list[Evaluation]:
    """The evaluations that no other one beats in both bytes and damage, by ascending bytes."""
    kept: list[Evaluation] = []
    whole = [evaluation for evaluation in evaluations if not evaluation.stopped]
    for evaluation in sorted(whole, key=lambda e: (e.kv_bytes, e.damage.mean, e.rank)):
        if not kept or evaluation.damage.mean < kept[-1].damage.mean:
            kept.append(evaluation)
    return kept
