"""The running search: it evaluates each plan once, writes the journal, stops inferior plans early and ranks the others.

In: plans from a strategy. Out: evaluations, in the journal and in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mqadapt_rs.search.core.evaluation import Evaluation, EvaluatorSpec
from mqadapt_rs.search.core.executors import Pool, Work
from mqadapt_rs.search.core.limit import Limit
from mqadapt_rs.search.core.plan_order import branches, in_order

if TYPE_CHECKING:
    from mqadapt_rs.search.core.journal import Journal
    from mqadapt_rs.search.core.options import Options
    from mqadapt_rs.search.core.space import Layers, Space
    from mqadapt_rs.search.core.statistics import SequentialTest


@dataclass(frozen=True)
class Rule:
    """The rule that ranks plans."""

    limit: Limit | None = None
    """The limit of the cost; within it, the least damage wins."""
    max_damage: float | None = None
    """The limit of the damage; within it, the fewest K/V bytes win."""

    @classmethod
    def of(cls, space: Space, options: Options) -> Rule:
        """The rule that follows from options."""
        if options.latency_budget is not None:
            return cls(Limit(space, options.latency_budget, latency=True), options.max_damage)
        limit = None if options.kv_budget is None else Limit(space, options.kv_budget)
        return cls(limit, options.max_damage)

    @property
    def free(self) -> bool:
        """Whether there is no limit, so that plans of any size compete by damage."""
        return self.limit is None and self.max_damage is None

    def admits(self, evaluation: Evaluation) -> bool:
        """Whether a plan is within the limits."""
        within = self.limit is None or self.limit.fits(evaluation.plan)
        return within and (self.max_damage is None or evaluation.damage.mean <= self.max_damage)

    def key(self, evaluation: Evaluation) -> tuple[float, float, tuple[int, ...]]:
        """The sort key: the better plan first; the rank of the plan breaks ties, so that the order is deterministic."""
        damage, size = evaluation.damage.mean, float(evaluation.kv_bytes)
        first, second = (size, damage) if self.max_damage is not None else (damage, size)
        return first, second, evaluation.rank

    def in_words(self, unit: str) -> str:
        """The rule in words, as the end of a sentence."""
        limit = "" if self.limit is None else self.limit.in_words(self.limit.most)
        if self.max_damage is not None:
            return f"fewest K/V bytes at a damage of at most {self.max_damage:g} {unit}" + (
                f" with at most {limit}" if limit else ""
            )
        return "least damage" + (f" at no more than {limit}" if limit else "")


class Watcher(Protocol):
    """A callback for the progress of a search."""

    def __call__(
        self, evaluation: Evaluation, done: int, expected: int, best: Evaluation | None, seconds_left: float
    ) -> None:
        """Called when an evaluation is in the journal."""
        ...


class Study:
    """The interface of a search for strategies."""

    def __init__(
        self,
        space: Space,
        spec: EvaluatorSpec,
        pool: Pool,
        journal: Journal,
        *,
        rule: Rule,
        seed: int = 0,
        test: SequentialTest | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self.space = space
        self.spec = spec
        self.rule = rule
        self.seed = seed
        self._pool = pool
        self._journal = journal
        self._test = test
        self._watcher = watcher
        self._races = 0
        self._asked: dict[Layers, None] = {}  # in the order of requests; a resumed journal may hold more plans
        self._done = 0
        self._expected = 0
        self._fresh = 0
        self._started = time.monotonic()
        self.source = self._evaluate_source()

    @property
    def documents(self) -> int:
        """The number of losses of a complete evaluation."""
        return max(1, self.spec.documents)

    @property
    def evaluations(self) -> list[Evaluation]:
        """The requested evaluations that are known, the source first."""
        known = self._journal.evaluations
        return [known[plan] for plan in self._asked if plan in known]

    def _evaluate_source(self) -> Evaluation:
        plan = self.space.source
        known = self._journal.evaluations.get(plan)
        if known is None or len(known.losses) < self.documents:
            ((_work, outcome),) = self._pool.stream(self.spec, [Work((plan,), ((),), (0, self.documents))])
            losses = outcome.losses[0]
            known = Evaluation.of(
                self.space, self.spec.metric, plan, losses, losses, seconds=outcome.seconds[0], stage="source"
            )
            self._journal.add(known)
        self._asked[plan] = None
        return known

    def expect(self, evaluations: int) -> None:
        """Announce about how many more evaluations the strategy will request, for the estimate of the remaining time."""
        self._expected = self._done + evaluations

    def evaluate(self, plans: Iterable[Layers], stage: str) -> list[Evaluation]:
        """Evaluate plans on all documents, unless the journal has them; returns evaluations in the given order."""
        wanted = list(plans)
        ordered = self._in_order(wanted)
        self._asked.update(dict.fromkeys(ordered))
        for plan in ordered:
            known = self._journal.evaluations.get(plan)
            if known is not None and len(known.losses) == self.documents:
                self._note(known, fresh=False)
        missing = [plan for plan in ordered if not self._whole(plan)]
        for plan, losses, seconds in self._losses(missing, range(self.documents)):
            self._write(plan, losses, seconds, stage)
        return [self._journal.evaluations[plan] for plan in wanted]

    def race(self, plans: Iterable[Layers], stage: str, against: Sequence[Evaluation] = ()) -> list[Evaluation]:
        """Evaluate plans, and stop those early that are significantly worse than another one (or one of `against`).

        Stopped plans are marked. The error rate of the test bounds the probability that the plan is stopped which complete
        evaluations would rank best. Without a test, or with too few documents, all plans are evaluated completely.
        """
        wanted = list(dict.fromkeys(plans))
        if self._test is None:
            return self.evaluate(wanted, stage)
        blocks = self._test.blocks(self.documents)
        self._races += 1
        level = self._test.level(self._races, len(wanted) - 1 + len(against), len(blocks) - 1)
        running = self._in_order(wanted)
        self._asked.update(dict.fromkeys(running))
        losses: dict[Layers, list[float]] = {plan: [] for plan in running}
        seconds = dict.fromkeys(running, 0.0)
        rivals = [evaluation.losses for evaluation in against if not evaluation.stopped]
        for block in blocks:
            known = {plan for plan in running if self._known(plan) >= block.stop}
            for plan in known:
                losses[plan] += self._journal.evaluations[plan].losses[block.start : block.stop]
            for plan, found, spent in self._losses([plan for plan in running if plan not in known], block):
                losses[plan] += found
                seconds[plan] += spent
            if block.stop == self.documents:
                break
            leader = min(running, key=lambda plan: (sum(losses[plan]), self.space.rank(plan)))
            inferior = [
                plan
                for plan in running
                if any(
                    self._test.worse(losses[plan], rival, self.documents, level) for rival in [*rivals, losses[leader]]
                )
            ]
            for plan in inferior:
                running.remove(plan)
                if self._known(plan) < len(losses[plan]):
                    self._write(plan, losses[plan], seconds[plan], stage, stopped=True)
                else:
                    self._note(self._journal.evaluations[plan], fresh=False)
            if not running:
                break
        for plan in running:
            if self._whole(plan):
                self._note(self._journal.evaluations[plan], fresh=False)
            else:
                self._write(plan, losses[plan], seconds[plan], stage)
        return [self._journal.evaluations[plan] for plan in wanted]

    def best(self) -> list[Evaluation]:
        """The plans that may win, best first: completely evaluated, changed, within the limits."""
        admitted = [
            e for e in self.evaluations if not e.stopped and e.plan != self.space.source and self.rule.admits(e)
        ]
        return sorted(admitted, key=self.rule.key)

    def _in_order(self, plans: Iterable[Layers]) -> list[Layers]:
        """The plans without repetition, in the order in which they share most."""
        by_rank = {self.space.rank(plan): plan for plan in plans}
        return [by_rank[rank] for rank in in_order(by_rank)]

    def _known(self, plan: Layers) -> int:
        known = self._journal.evaluations.get(plan)
        return 0 if known is None else len(known.losses)

    def _whole(self, plan: Layers) -> bool:
        return self._known(plan) == self.documents

    def _losses(self, plans: Sequence[Layers], documents: range) -> Iterable[tuple[Layers, tuple[float, ...], float]]:
        """Evaluate ordered plans on some documents; yields results as they finish."""
        group = max(1, self.spec.group)
        kept = branches(plans)
        works = [
            Work(tuple(plans[i : i + group]), tuple(kept[i : i + group]), (documents.start, documents.stop))
            for i in range(0, len(plans), group)
        ]
        for work, outcome in self._pool.stream(self.spec, works):
            yield from zip(work.plans, outcome.losses, outcome.seconds, strict=True)

    def _write(
        self, plan: Layers, losses: Sequence[float], seconds: float, stage: str, *, stopped: bool = False
    ) -> None:
        evaluation = Evaluation.of(
            self.space,
            self.spec.metric,
            plan,
            losses,
            self.source.losses,
            seconds=seconds,
            stage=stage,
            stopped=stopped,
        )
        self._journal.add(evaluation)
        self._note(evaluation, fresh=True)

    def _note(self, evaluation: Evaluation, *, fresh: bool) -> None:
        self._done += 1
        self._fresh += fresh
        self._expected = max(self._expected, self._done)
        if self._watcher is not None:
            each = (time.monotonic() - self._started) / self._fresh if self._fresh else 0.0
            best = self.best()
            self._watcher(
                evaluation, self._done, self._expected, best[0] if best else None, each * (self._expected - self._done)
            )


Run = Callable[[Study, "Options"], None]
