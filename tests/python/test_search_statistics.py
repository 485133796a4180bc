"""The statistics do what they promise, also where nothing is normal."""

from __future__ import annotations

import json
import math
import random
from typing import TYPE_CHECKING

import pytest

from mqadapt_rs.search import Options, conduct
from mqadapt_rs.search.core.statistics import SequentialTest, mean_and_error, paired, t_quantile
from search_fakes import SPACE, FakeSpec, additive

if TYPE_CHECKING:
    from pathlib import Path

FULL = SPACE.kv_bytes(SPACE.source)


def test_t_quantiles() -> None:
    stats = pytest.importorskip("scipy.stats", exc_type=ImportError)
    for degrees in (1, 2, 3, 4, 7, 15, 29, 30, 31, 63, 500):
        for probability in (0.5, 0.9, 0.975, 0.999, 1 - 1e-5, 1 - 1e-8):
            expected = stats.t.ppf(probability, degrees)
            assert t_quantile(probability, degrees) == pytest.approx(expected, rel=3e-3, abs=1e-9)
    for wrong in ((0.4, 3), (1.0, 3), (0.9, 0)):
        with pytest.raises(ValueError, match="t quantile"):
            t_quantile(*wrong)


def test_paired_differences_remove_what_documents_share() -> None:
    draws = random.Random(1)
    documents = [draws.gauss(3, 2) for _ in range(100)]
    a = [d + draws.gauss(0.1, 0.05) for d in documents]
    difference = paired(a, documents)
    _, unpaired = mean_and_error(a)
    assert difference.mean == pytest.approx(0.1, abs=0.02)
    assert difference.standard_error is not None
    assert unpaired is not None
    assert difference.standard_error < unpaired / 20
    assert difference.clear
    assert paired([1.0], [0.5]).low is None
    with pytest.raises(ValueError, match="same"):
        paired([1.0, 2.0], [1.0])


@pytest.mark.parametrize("number", [8, 30])
def test_intervals_cover(number: int) -> None:
    draws = random.Random(2)
    hits = 0
    for _ in range(1000):
        sample = [draws.gauss(1, 1) for _ in range(number)]
        interval = paired(sample, [0.0] * number)
        assert interval.low is not None
        assert interval.high is not None
        hits += interval.low <= 1 <= interval.high
    assert 925 <= hits <= 975


@pytest.mark.parametrize("number", [2, 3, 5, 8, 24])
@pytest.mark.parametrize("shape", ["normal", "skewed", "rare", "coin"])
def test_equal_plans_are_told_apart_in_5_percent_of_trials(shape: str, number: int) -> None:
    draws = random.Random(f"{shape} {number}")
    noise = {
        "normal": lambda: draws.gauss(0, 1),
        "skewed": lambda: draws.lognormvariate(0, 1),
        "rare": lambda: float(draws.random() < 0.1),
        "coin": lambda: float(draws.random() < 0.5),
    }[shape]
    trials = 4000
    told_apart = sum(
        paired([noise() for _ in range(number)], [noise() for _ in range(number)]).clear for _ in range(trials)
    )
    assert told_apart <= 0.06 * trials  # three standard errors above 5 %


def test_blocks_cover_every_document_once() -> None:
    test = SequentialTest()
    for documents in (1, 15, 16, 17, 24, 32, 100, 200, 1001):
        blocks = test.blocks(documents)
        assert [doc for block in blocks for doc in block] == list(range(documents))
        assert len(blocks) == 1 or len(blocks[0]) >= test.least
        assert len(blocks) <= test.looks + 1
    for wrong in (0, 1, -0.1, 0.5):
        with pytest.raises(ValueError, match="error rate"):
            SequentialTest(wrong)
    spent = [test.level(race, 10, 5) * 10 * 5 for race in range(1, 1000)]
    assert math.fsum(spent) < test.error_rate


def lost_races(shape: str, error_rate: float, races: int) -> tuple[int, float]:
    """Races of five plans whose full-sample winner was given up, and the share of documents read."""
    draws = random.Random(f"{shape} {error_rate}")
    test = SequentialTest(error_rate)
    documents, plans = 96, 4
    blocks = test.blocks(documents)
    level = test.level(1, plans - 1, len(blocks) - 1) * 2  # level of one race when it is the only one
    lost = read = 0
    for _ in range(races):
        noise = {
            "normal": lambda: draws.gauss(0, 1),
            "skewed": lambda: draws.lognormvariate(0, 1),
            "rare": lambda: float(draws.random() < 0.1) - float(draws.random() < 0.1),
        }[shape]
        # all plans are alike in truth, where a wrong choice is easiest to make
        losses = [[noise() for _ in range(documents)] for _ in range(plans)]
        winner = min(range(plans), key=lambda plan: math.fsum(losses[plan]))
        running = list(range(plans))
        for block in blocks[:-1]:
            leader = min(running, key=lambda plan: math.fsum(losses[plan][: block.stop]))
            running = [
                plan for plan in running
                if not test.worse(losses[plan][: block.stop], losses[leader][: block.stop], documents, level)
            ]  # fmt: skip
            read += len(block) * len(running)
        lost += winner not in running
    return lost, read / (races * documents * plans)


@pytest.mark.parametrize("shape", ["normal", "skewed", "rare"])
def test_the_stated_error_rate_holds(shape: str) -> None:
    races = 200
    lost, _ = lost_races(shape, 0.2, races)
    assert lost <= 0.2 * races


def test_hopeless_plans_are_stopped_and_the_winner_stays(tmp_path: Path) -> None:
    spec = FakeSpec(documents=160, noise=1.0)
    budget = FULL * 0.5
    raced = conduct(spec, SPACE, "random", Options(kv_budget=budget, trials=24), tmp_path / "raced", seed=3)
    whole = conduct(
        spec, SPACE, "random", Options(kv_budget=budget, trials=24), tmp_path / "whole", seed=3, error_rate=None
    )
    assert raced.plan == whole.plan
    stopped = [e for e in raced.evaluations if e.stopped]
    assert len(stopped) >= 12
    assert all(len(e.losses) < 160 for e in stopped)
    assert sum(len(e.losses) for e in raced.evaluations) < 0.6 * sum(len(e.losses) for e in whole.evaluations)
    lines = (tmp_path / "raced" / "journal.jsonl").read_text().splitlines()
    assert sum(json.loads(line).get("stopped", False) for line in lines) == len(stopped)
    # no plan that was stopped could have won, and no stopped plan is compared as if it were whole
    assert raced.winner is not None
    assert all(additive(e.plan) > additive(raced.winner.plan) for e in stopped)
    assert raced.runner_up is not None
    assert raced.runner_up.stopped
    assert raced.difference is not None
    assert raced.difference.clear
    assert "stopped early" in raced.verdict


def test_a_tie_is_called_a_tie(tmp_path: Path) -> None:
    """Two plans of equal damage under noise are not told apart; with a gap they are."""
    noisy = conduct(FakeSpec(noise=5.0), SPACE, "sensitivity", Options(), tmp_path / "noisy")
    clear = conduct(FakeSpec(noise=0.001), SPACE, "sensitivity", Options(), tmp_path / "clear")
    assert "NOT distinguishable" in noisy.verdict
    assert noisy.difference is not None
    assert not noisy.difference.clear
    assert "NOT" not in clear.verdict
    assert clear.difference is not None
    assert clear.difference.clear
    assert json.loads((tmp_path / "noisy" / "summary.json").read_text())["distinguishable"] is False


def test_predicted_damage_claims_no_certainty(tmp_path: Path) -> None:
    result = conduct(FakeSpec(documents=0), SPACE, "sensitivity", Options(), tmp_path)
    assert result.difference is None
    assert "no documents" in result.verdict
    assert all(e.standard_error is None and len(e.losses) == 1 for e in result.evaluations)
