"""Strategies against evaluators whose best plans are known."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from mqadapt_rs.search import STRATEGIES, Evaluation, Layers, Metric, Options, SearchResult, conduct
from mqadapt_rs.search.core import plan_record
from mqadapt_rs.search.core.knapsack import Choice, solve
from mqadapt_rs.search.core.pareto_front import front
from mqadapt_rs.search.core.plan_order import branches, in_order, shared
from mqadapt_rs.search.core.plan_record import count, counts
from mqadapt_rs.search.core.space import parse_budget
from mqadapt_rs.search.strategies.from_end import numbers
from search_fakes import FOUR, LAYERS, ONE, SPACE, TWO, WEIGHTS, FakeSpec, additive, coupled, interacting

if TYPE_CHECKING:
    from pathlib import Path

FULL = SPACE.kv_bytes(SPACE.source)


def found(folder: Path, strategy: str, spec: FakeSpec | None = None, **options: object) -> SearchResult:
    return conduct(spec or FakeSpec(), SPACE, strategy, Options(**options), folder)  # type: ignore[arg-type]


def shapes(result: SearchResult) -> set[Layers]:
    return {evaluation.plan for evaluation in result.evaluations}


def all_plans() -> list[Layers]:
    return list(itertools.product((ONE, TWO, FOUR), repeat=LAYERS))


def test_sensitivity_measures_every_layer_at_every_count(tmp_path: Path) -> None:
    result = found(tmp_path, "sensitivity")
    assert len(result.evaluations) == 1 + LAYERS * 2
    assert result.plan == SPACE.plan(SPACE.single(WEIGHTS.index(min(WEIGHTS)), TWO))
    by_plan = {e.plan: e for e in result.evaluations}
    for layer, weight in enumerate(WEIGHTS):
        assert by_plan[SPACE.single(layer, ONE)].damage.mean == pytest.approx(3 * weight)


def test_counts_restrict_the_space(tmp_path: Path) -> None:
    space = replace(SPACE, allowed=(TWO,))
    result = conduct(FakeSpec(), space, "sensitivity", Options(counts=(2,)), tmp_path)
    assert shapes(result) == {space.source} | {space.single(layer, TWO) for layer in range(LAYERS)}


def test_from_end_doubles_then_bisects(tmp_path: Path) -> None:
    assert numbers(28) == [2, 4, 8, 16, 28]
    assert numbers(16) == [2, 4, 8, 16]
    result = found(tmp_path / "a", "from-end")
    assert shapes(result) == {SPACE.source, *(SPACE.last(n, ONE) for n in (2, 4, 8))}
    for limit in (0.0, 4.6, 16.5, 17.0, 30.0, 1000.0):
        fits = [n for n in range(1, LAYERS + 1) if additive(SPACE.last(n, ONE)) <= limit]
        result = found(tmp_path / str(limit), "from-end", max_damage=limit)
        assert result.plan == (SPACE.plan(SPACE.last(max(fits), ONE)) if fits else None)
        assert (tmp_path / str(limit) / "best.plan.json").exists() == bool(fits)


def test_alternate_takes_every_second_layer_from_the_end(tmp_path: Path) -> None:
    result = found(tmp_path, "alternate")
    assert shapes(result) == {SPACE.source, *(SPACE.alternate(n, ONE) for n in (2, 3, 4))}
    assert counts(SPACE.alternate(3, ONE)) == [4, 4, 4, 1, 4, 1, 4, 1]


def test_greedy_takes_the_cheapest_layer_each_time(tmp_path: Path) -> None:
    space = replace(SPACE, allowed=(ONE,))
    result = conduct(FakeSpec(), space, "greedy", Options(kv_budget=FULL * 0.7), tmp_path)
    cheapest = sorted(range(LAYERS), key=lambda layer: WEIGHTS[layer])[:4]  # 4 of 8 layers to a quarter: 62.5 %
    assert result.plan == space.plan(space.with_layers(cheapest, ONE))
    result = conduct(FakeSpec(), space, "greedy", Options(max_damage=7.0), tmp_path / "limit")
    assert result.plan == space.plan(
        space.with_layers(cheapest[:3], ONE)
    )  # 0.75 + 1.5 + 2.25 = 4.5; the fourth makes 7.5
    assert result.winner is not None
    assert result.winner.damage.mean <= 7.0


@pytest.mark.parametrize("share", ["30%", "50%", "75%", "90%"])
def test_budget_is_exact_where_damages_add_up(tmp_path: Path, share: str) -> None:
    budget = parse_budget(share, FULL)
    best = min(additive(plan) for plan in all_plans() if SPACE.kv_bytes(plan) <= budget)
    result = found(tmp_path, "budget", kv_budget=budget)
    assert result.winner is not None
    assert result.winner.kv_bytes <= budget
    assert result.winner.damage.mean == pytest.approx(best)


@pytest.mark.parametrize("share", [0.5, 0.6, 0.75])
def test_local_search_repairs_what_the_knapsack_cannot_see(tmp_path: Path, share: float) -> None:
    spec, budget = FakeSpec("coupled"), FULL * share
    only = found(tmp_path / "0", "budget", spec, kv_budget=budget, swaps=0).winner
    swapped = found(tmp_path / "12", "budget", spec, kv_budget=budget).winner
    assert only is not None
    assert swapped is not None
    assert swapped.kv_bytes <= budget
    assert swapped.damage.mean < only.damage.mean
    assert swapped.damage.mean == min(coupled(plan) for plan in all_plans() if SPACE.kv_bytes(plan) <= budget)


def test_budget_never_loses_to_a_fixed_pattern(tmp_path: Path) -> None:
    result = found(tmp_path, "budget", FakeSpec("interacting"), kv_budget=FULL * 0.5, swaps=0)
    assert result.winner is not None
    fixed = [SPACE.last(n, ONE) for n in range(LAYERS + 1)] + [SPACE.alternate(n, ONE) for n in range(LAYERS // 2 + 1)]
    fitting = [interacting(plan) for plan in fixed if SPACE.kv_bytes(plan) <= FULL * 0.5]
    assert result.winner.damage.mean <= min(fitting)


def test_pareto_front_is_the_true_one_where_damages_add_up(tmp_path: Path) -> None:
    result = found(tmp_path, "pareto", points=24)
    points = {e.kv_bytes: e.damage.mean for e in front(result.evaluations)}
    for size, damage in points.items():
        assert damage == pytest.approx(min(additive(p) for p in all_plans() if SPACE.kv_bytes(p) <= size))
    assert len(points) >= 15


def test_random_plans_depend_on_the_seed_alone(tmp_path: Path) -> None:
    results = [
        conduct(FakeSpec(), SPACE, "random", Options(trials=10, kv_budget=FULL / 2), tmp_path / str(i), seed=seed)
        for i, seed in enumerate((1, 1, 2))
    ]
    assert shapes(results[0]) == shapes(results[1]) != shapes(results[2])
    assert all(e.kv_bytes <= FULL / 2 for e in results[0].evaluations[1:])


def test_a_budget_of_time_fills_the_knapsack_with_seconds(tmp_path: Path) -> None:
    # layers of odd index gain nothing by fewer heads
    seconds = tuple(
        {c: 1e-3 * (1 + (count(c) if layer % 2 == 0 else 4)) for c in (ONE, TWO, FOUR)} for layer in range(LAYERS)
    )
    space = replace(SPACE, layer_seconds=seconds)
    most = 0.8 * sum(layer[FOUR] for layer in seconds)
    result = conduct(FakeSpec(), space, "budget", Options(latency_budget=most), tmp_path)
    fitting = [p for p in all_plans() if sum(s[own] for s, own in zip(seconds, p, strict=True)) <= most]
    assert result.winner is not None
    assert result.winner.damage.mean == pytest.approx(min(map(additive, fitting)))
    assert result.winner.plan[1::2] == (FOUR,) * 4
    assert "ms per decoded token" in result.verdict


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy(strategy: str, tmp_path: Path) -> None:
    """Layers that cannot be reduced, or not alike, are no obstacle; the plan file is what convert reads."""
    space = plan_record.space((1, 6, 2, 4, 3), (8, 8, 16, 16, 32))

    class Spec(FakeSpec):
        def build(self) -> object:  # type: ignore[override]
            return Cost(self)

    class Cost:
        def __init__(self, spec: FakeSpec) -> None:
            self.spec = spec

        def losses(self, plans, _branches, documents):  # type: ignore[no-untyped-def]
            for plan in plans:
                yield [float(space.kv_bytes(space.source) - space.kv_bytes(plan))] * len(documents)

    options = Options(kv_budget=space.kv_bytes(space.source) * 0.6) if strategy == "budget" else Options()
    if strategy == "given":
        options = Options(plans=(space.last(2, ONE), space.source, space.alternate(2, ONE)))
    result = conduct(Spec(), space, strategy, options, tmp_path)
    assert result.winner is not None
    assert all(own in space.choices(layer) for e in result.evaluations for layer, own in enumerate(e.plan))
    assert json.loads((tmp_path / "best.plan.json").read_text()) == {"num_key_value_heads": counts(result.winner.plan)}
    assert json.loads((tmp_path / "summary.json").read_text())["winner"]["kv_bytes_per_token"] == result.winner.kv_bytes


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("best", Options(), "no strategy 'best'"),
        ("sensitivity", Options(kv_budget=4.0), "does nothing for the strategy 'sensitivity'"),
        ("given", Options(), "needs --plan"),
        ("greedy", Options(trials=3), "it is for random"),
        ("budget", Options(), "needs --kv-budget"),
        ("budget", Options(kv_budget=FULL / 5), "no plan fits"),
        ("random", Options(kv_budget=FULL / 5), "no plan fits"),
        ("greedy", Options(kv_budget=FULL / 5), "no plan fits"),
        ("random", Options(trials=0), "expected a positive number"),
    ],
)
def test_options_that_do_not_fit_are_refused(strategy: str, options: Options, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        conduct(FakeSpec(), SPACE, strategy, options, tmp_path)
    assert not list(tmp_path.iterdir())  # said before anything is evaluated, so the folder can be used again


def test_spaces_and_budgets() -> None:
    with pytest.raises(ValueError, match="nothing to search"):
        plan_record.space((1, 1), (8, 8))
    with pytest.raises(ValueError, match="with gqa3"):
        plan_record.space((4, 4), (8, 8), allowed=(3,))
    assert counts(plan_record.space((6, 1), (8, 8)).choices(0)) == [1, 2, 3, 6]
    assert parse_budget("50%", 300) == parse_budget(0.5, 300) == parse_budget("150", 300) == 150
    for wrong in ("half", "-1", "0", "0%", "101%", "nan", "inf%", "301", "%"):
        with pytest.raises(ValueError, match="budget"):
            parse_budget(wrong, 300)
    space = plan_record.space((4,) * 7, (8,) * 7)
    assert space.describe(plan_record.layers((4, 1, 1, 1, 2, 4, 1))) == "mqa:1-3,6; gqa2:4"
    assert space.describe(space.source) == "keep"


def test_knapsack_is_exact() -> None:
    draws = random.Random(5)
    for _ in range(200):
        layers = [
            [Choice(c * size, draws.choice([0.0, draws.random(), -draws.random()])) for c in (1, 2, 4)]
            for size in (draws.choice([8, 8, 24]) for _ in range(5))
        ]
        budget = draws.uniform(0.1, 1.1) * sum(layer[-1].cost for layer in layers)
        everything = [
            (sum(c.damage for c in chosen), sum(c.cost for c in chosen)) for chosen in itertools.product(*layers)
        ]
        allowed = [damage for damage, cost in everything if cost <= budget]
        answer = solve(layers, budget)
        if not allowed:
            assert answer is None
            continue
        assert answer is not None
        chosen = [layer[at] for layer, at in zip(layers, answer, strict=True)]
        assert sum(c.cost for c in chosen) <= budget
        assert sum(c.damage for c in chosen) == pytest.approx(min(allowed), abs=1e-12)


def test_knapsack_over_times_stays_within_the_budget() -> None:
    draws = random.Random(6)
    for _ in range(50):
        layers = [[Choice(draws.random() * 1e-3, draws.random()) for _ in range(3)] for _ in range(4)]
        budget = 0.6 * sum(max(c.cost for c in layer) for layer in layers)
        answer = solve(layers, budget)
        totals = [
            (sum(c.damage for c in chosen), chosen)
            for chosen in itertools.product(*layers)
            if sum(c.cost for c in chosen) <= budget * (1 - 1e-3)
        ]
        if answer is not None and totals:
            chosen = [layer[at] for layer, at in zip(layers, answer, strict=True)]
            assert sum(c.cost for c in chosen) <= budget
            assert sum(c.damage for c in chosen) <= min(totals)[0] + 1e-12


def simulate(plans: list[tuple[int, ...]]) -> tuple[int, int]:
    """Layers run, and most hidden states held, by an evaluator that keeps what `branches` says."""
    kept: dict[tuple[int, ...], None] = {}
    ran, most = 0, 0
    for plan, depths in zip(plans, branches(plans), strict=True):
        start = max((len(prefix) for prefix in kept if plan[: len(prefix)] == prefix), default=0)
        ran += len(plan) - start
        kept = {p: None for p in [*kept, *(plan[:d] for d in depths)] if plan[: len(p)] == p and len(p) in depths}
        most = max(most, len(kept))
    return ran, most


def test_order_shares_every_prefix_and_holds_few_states() -> None:
    draws = random.Random(7)
    singles = [tuple(1 if i == layer else 3 for i in range(30)) for layer in range(30)]
    cases = [singles, [*singles, (3,) * 30]]
    cases += [[tuple(draws.choice((1, 3)) for _ in range(12)) for _ in range(n)] for n in (1, 2, 50, 200)]
    for plans in cases:
        ordered = in_order(plans)
        assert sorted(ordered) == sorted(set(plans))
        assert ordered == in_order(plans[::-1])
        prefixes = {plan[:depth] for plan in plans for depth in range(1, len(plan) + 1)}
        ran, most = simulate(ordered)
        assert ran == len(prefixes)  # every edge of the tree once
        assert most <= len(set(plans)).bit_length()
    assert simulate(in_order(singles)) == (sum(range(1, 31)) + 29, 1)  # half of 30 * 30, one state held
    assert shared((1, 2, 3), (1, 2, 4)) == 2


def test_front_keeps_what_nothing_beats() -> None:
    def point(size: int, damage: float) -> Evaluation:
        space = plan_record.space((12,), (1,))
        return Evaluation.of(
            space, Metric("m", "", ""), plan_record.layers((size,)), [damage], [0.0], seconds=0, stage=""
        )

    kept = front([point(1, 5.0), point(2, 5.0), point(2, 3.0), point(3, 4.0), point(4, 0.0)])
    assert [(e.kv_bytes, e.damage.mean) for e in kept] == [(1, 5.0), (2, 3.0), (4, 0.0)]
