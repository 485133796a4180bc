"""The run of a search with any evaluator.

In: a specification of the evaluator, the space of plans, a strategy with its options, a folder. Out: the journal,
`best.plan.json` and `summary.json` in the folder, and the winner with the uncertainty of its lead.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from mqadapt_rs._core import Plan
from mqadapt_rs.errors import ArgumentError
from mqadapt_rs.search.core import plan_record
from mqadapt_rs.search.core.executors import Pool, in_process
from mqadapt_rs.search.core.journal import BEST, SUMMARY, Journal, write_json
from mqadapt_rs.search.core.pareto_front import front
from mqadapt_rs.search.core.statistics import Difference, SequentialTest, paired
from mqadapt_rs.search.core.study import Rule, Study, Watcher
from mqadapt_rs.search.strategies.registry import STRATEGIES

if TYPE_CHECKING:
    from pathlib import Path

    from mqadapt_rs.search.core.evaluation import Evaluation, EvaluatorSpec, Metric
    from mqadapt_rs.search.core.options import Options
    from mqadapt_rs.search.core.space import Space


@dataclass(frozen=True)
class SearchResult:
    """The result of a search."""

    folder: Path
    winner: Evaluation | None
    """The best plan by the rule; `None` if no plan meets the rule."""
    runner_up: Evaluation | None
    difference: Difference | None
    """Loss of the runner-up minus loss of the winner, paired by document, with its t interval."""
    verdict: str
    """Winner, runner-up and whether their difference is significant, in words."""
    evaluations: tuple[Evaluation, ...]
    """All evaluations, the source first."""

    @property
    def plan(self) -> Plan | None:
        """The plan of the winner."""
        return None if self.winner is None else Plan.from_layers(self.winner.plan, self.evaluations[0].plan)


def check(strategy: str, options: Options) -> None:
    """Validate a strategy and its options.

    Raises:
        ArgumentError: the strategy does not exist, or an option is invalid or unused.
    """
    if strategy not in STRATEGIES:
        raise ArgumentError(f"there is no strategy '{strategy}': expected one of {', '.join(STRATEGIES)}")
    for option in fields(options):
        value = getattr(options, option.name)
        if value is None or option.name == "counts":
            continue
        if option.name not in STRATEGIES[strategy].uses:
            users = [name for name, known in STRATEGIES.items() if option.name in known.uses]
            raise ArgumentError(
                f"{_switch(option.name)} does nothing for the strategy '{strategy}'; it is for {', '.join(users)}"
            )
        if isinstance(value, float) and math.isnan(value):
            raise ArgumentError(f"{_switch(option.name)} {value}: expected a number")
        if isinstance(value, int) and value < (0 if option.name == "swaps" else 1):
            raise ArgumentError(f"{_switch(option.name)} {value}: expected a positive number")
    needs = STRATEGIES[strategy].needs
    if needs and all(getattr(options, name) is None for name in needs):
        raise ArgumentError(f"the strategy '{strategy}' needs {' or '.join(map(_switch, needs))}")


def fits(strategy: str, options: Options, space: Space) -> None:
    """Validate options against a model.

    Raises:
        ArgumentError: no plan of the model fits the options.
    """
    limit = Rule.of(space, options).limit
    if limit is not None and limit.smallest() > limit.most:
        raise ArgumentError(limit.refusal())
    refuse = STRATEGIES[strategy].refuse
    if refuse is not None:
        refuse(space, options)


def _switch(option: str) -> str:
    """The name of an option on the command line."""
    return "--plan" if option == "plans" else f"--{option.replace('_', '-')}"


def conduct(
    spec: EvaluatorSpec,
    space: Space,
    strategy: str,
    options: Options,
    folder: Path,
    *,
    pool: Pool | None = None,
    seed: int = 0,
    resume: bool = False,
    error_rate: float | None = 0.05,
    watcher: Watcher | None = None,
    about: dict[str, Any] | None = None,
    merge: dict[str, Any] | None = None,
) -> SearchResult:
    """Run a strategy.

    Args:
        spec: specification of the evaluator.
        space: the space of plans.
        strategy: a key of `STRATEGIES`.
        options: its options.
        folder: folder of journal and results; it is created.
        pool: workers; by default evaluations run in this process.
        seed: seed of the random number generators.
        resume: resume from the journal in the folder.
        error_rate: error rate of the sequential test that stops plans early; `None` evaluates all plans completely.
        watcher: called after every evaluation.
        about: facts for plots and report (`model`, `command`, ...); kept in `summary.json`.
        merge: the fields of a plan file that say how its heads are merged.

    Raises:
        ArgumentError: an option is invalid; `JournalError`, a subclass, if the journal cannot be continued.
    """
    check(strategy, options)
    fits(strategy, options, space)
    test = None if error_rate is None or spec.documents == 0 else SequentialTest(error_rate)
    rule = Rule.of(space, options)
    known = spec.fingerprints()
    digest = hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]
    header = {
        **known,
        "metric": spec.metric.name,
        "unit": spec.metric.unit,
        "damage_unit": spec.metric.damage_unit,
        "scale": spec.metric.scale,
        "fingerprint": digest,
        "strategy": strategy,
        "seed": seed,
        "options": plan_record.option_fields(options),
        "error_rate": None if test is None else test.error_rate,
        "documents": spec.documents,
        **plan_record.space_fields(space),
    }
    header = json.loads(json.dumps(header))  # tuples become lists, as they will be when read back
    own = pool is None
    pool = in_process() if pool is None else pool
    try:
        with Journal(folder, header, space, spec.metric, resume=resume) as journal:
            study = Study(space, spec, pool, journal, rule=rule, seed=seed, test=test, watcher=watcher)
            STRATEGIES[strategy].run(study, options)
            result = conclude(folder, study, spec.metric)
    finally:
        if own:
            pool.close()
    _write(result, space, spec.metric, strategy, rule, test, {"executor": pool.name, **(about or {})}, merge or {})
    return result


def conclude(folder: Path, study: Study, metric: Metric) -> SearchResult:
    """Select the winner and test its lead over the runner-up."""
    ranked = study.best()
    winner = ranked[0] if ranked else None
    runner_up = ranked[1] if len(ranked) > 1 else None
    if winner is not None and runner_up is None:
        given_up = [e for e in study.evaluations if e.stopped and study.rule.admits(e)]
        runner_up = min(given_up, key=study.rule.key, default=None)
    difference = None
    if winner is not None and runner_up is not None and study.spec.documents:
        read = len(runner_up.losses)
        difference = paired(runner_up.losses, winner.losses[:read])
    verdict = _verdict(winner, runner_up, difference, study, metric)
    return SearchResult(folder, winner, runner_up, difference, verdict, tuple(study.evaluations))


def _verdict(
    winner: Evaluation | None, runner_up: Evaluation | None, difference: Difference | None, study: Study, metric: Metric
) -> str:
    if winner is None:
        return f"No evaluated plan meets the rule ({study.rule.in_words(metric.damage_unit)})."
    text = (
        f"Winner ({study.rule.in_words(metric.damage_unit)}): {study.space.describe(winner.plan)}, "
        f"damage {winner.damage} {metric.damage_unit}."
    )
    limit = study.rule.max_damage
    if limit is not None and winner.damage.high is not None and winner.damage.high > limit:
        text += (
            f" The 95 % interval of its damage reaches {winner.damage.high:.4g}, beyond the limit: on other text it "
            "may exceed it."
        )
    if runner_up is None:
        return text + " No other plan meets the rule."
    text += f" Runner-up: {study.space.describe(runner_up.plan)}, damage {runner_up.damage}"
    if difference is None or difference.low is None or difference.high is None:
        number = "no" if difference is None else "too few"
        return text + f". There are {number} documents to test the difference on."
    verdict = "distinguishable" if difference.clear else "NOT distinguishable"
    return text + (
        f"; difference {difference.mean:.4g} [{difference.low:.4g}, {difference.high:.4g}] on "
        f"{len(runner_up.losses)} documents: {verdict} at 95 %."
        + (" All other plans were stopped early as worse." if runner_up.stopped else "")
    )


def _write(
    result: SearchResult,
    space: Space,
    metric: Metric,
    strategy: str,
    rule: Rule,
    test: SequentialTest | None,
    about: dict[str, Any],
    merge: dict[str, Any],
) -> None:
    def facts(evaluation: Evaluation | None) -> dict[str, Any] | None:
        if evaluation is None:
            return None
        return {
            "num_key_value_heads": plan_record.counts(evaluation.plan),
            "plan": space.describe(evaluation.plan),
            "value": evaluation.value,
            "standard_error": evaluation.standard_error,
            "damage": asdict(evaluation.damage),
            "kv_bytes_per_token": evaluation.kv_bytes,
        }

    if result.winner is not None:
        write_json(result.folder / BEST, {"num_key_value_heads": plan_record.counts(result.winner.plan), **merge})
    write_json(
        result.folder / SUMMARY,
        {
            "strategy": strategy,
            "metric": metric.name,
            "rule": rule.in_words(metric.damage_unit),
            "verdict": result.verdict,
            "winner": facts(result.winner),
            "front": [facts(evaluation) for evaluation in front(result.evaluations)],
            "runner_up": facts(result.runner_up),
            "source": facts(result.evaluations[0]),
            "difference": None if result.difference is None else asdict(result.difference),
            "distinguishable": None if result.difference is None else result.difference.clear,
            "error_rate": None if test is None else test.error_rate,
            "evaluations": len(result.evaluations),
            "stopped": sum(e.stopped for e in result.evaluations),
            "seconds_evaluating": round(sum(e.seconds for e in result.evaluations), 3),
            **about,
        },
    )
