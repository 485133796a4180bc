"""The evaluator of lm-eval tasks: `task:NAME/METRIC`.

In: a task and a model. Out: one loss per document: the metric, negated if higher is better. Prompts are built and tokenised once
for all plans; lm-eval computes the metric of each document.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mqadapt_rs.errors import ArgumentError
from mqadapt_rs.search.core.evaluation import Metric
from mqadapt_rs.search.evaluators.prefix_cache import Prefixes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from mqadapt_rs.lm_eval import MqadaptLM
    from mqadapt_rs.search.core.space import Layers
    from mqadapt_rs.search.evaluators.data import Data
    from mqadapt_rs.search.evaluators.overlays import PlanOverlays

    Pair = tuple[list[int], list[int]]


@dataclass
class Task:
    """An lm-eval task with its requests."""

    task: Any
    """lm-eval's `Task`."""
    key: str
    """The metric."""
    higher_is_better: bool
    documents: list[tuple[Any, list[Any]]]
    """Each document with its requests, in the order of evaluation."""
    shots: int

    @property
    def metric(self) -> Metric:
        """The metric of the losses."""
        name = f"task:{self.task.config.task}/{self.key}"
        return Metric(name, self.key, f"{self.key} lost" if self.higher_is_better else self.key, self._scale)

    @property
    def _scale(self) -> str:
        return "negative" if self.higher_is_better else "identity"

    @classmethod
    def load(cls, name: str, data: Data, seed: int, lm: MqadaptLM) -> Task:
        """Load the task of `NAME/METRIC` and build the requests of its documents.

        Documents are evaluated in a random order that depends on the seed alone.

        Raises:
            ArgumentError: there is no such task or metric, or the metric is not a mean over documents.
        """
        from mqadapt_rs.lm_eval.run import task_manager

        task_name, _, key = name.partition("/")
        loaded = task_manager([task_name] if task_name else [], data.include_path).load([task_name])["tasks"]
        if len(loaded) != 1:
            raise ArgumentError(f"'{task_name}' is a group of {len(loaded)} tasks: a search needs one task")
        (task,) = loaded.values()
        if data.num_fewshot is not None:
            task.set_config("num_fewshot", data.num_fewshot)
        task.set_fewshot_seed(1234)  # the default of lm-eval
        directions = task.higher_is_better()
        if key not in directions:
            raise ArgumentError(
                f"the task '{task_name}' has no metric '{key}': expected one of {', '.join(directions)}"
            )
        task.build_all_requests(limit=data.limit, rank=0, world_size=1, tokenizer_name=lm.tokenizer_name)
        by_document: dict[int, list[Any]] = {}
        for instance in task.instances:
            by_document.setdefault(instance.doc_id, []).append(instance)
        numbers = sorted(by_document)
        random.Random(seed).shuffle(numbers)
        documents = [(by_document[n][0].doc, sorted(by_document[n], key=lambda i: i.idx)) for n in numbers]
        return cls(task, key, bool(directions[key]), documents, int(task.config.num_fewshot or 0))

    def losses(self, documents: range, answers: Sequence[Any]) -> list[float]:
        """The loss of each document, from the answers to its requests, in order."""
        instances = [instance for number in documents for instance in self.documents[number][1]]
        for instance, answer in zip(instances, answers, strict=True):
            instance.resps = [answer]
        self.task._instances = instances
        self.task.apply_filters()
        found = []
        for number in documents:
            document, requests = self.documents[number]
            values = self.task.process_results(document, [next(iter(r.filtered_resps.values())) for r in requests])
            value = values[self.key]
            if not isinstance(value, (int, float)):
                kind = type(value).__name__
                raise ArgumentError(
                    f"'{self.key}' is not a mean over documents (one gives a {kind}): use another metric"
                )
            found.append(-float(value) if self.higher_is_better else float(value))
        return found


class TaskEvaluator:
    """Computes the losses of the documents of a task."""

    def __init__(self, overlays: PlanOverlays, lm: MqadaptLM, task: Task, max_memory: int) -> None:
        """`lm`: the lm-eval model, whose `model` is set to that of each plan in turn."""
        self.overlays = overlays
        self.max_memory = max_memory
        self.prefixes = Prefixes(0, tuple(overlays.source.plan.layers))
        self._documents = range(0)
        self.lm = lm
        self.task = task
        instances = [instance for _, requests in task.documents for instance in requests]
        self.scored = all(instance.request_type == "loglikelihood" for instance in instances)
        self.pairs: list[list[Pair]] = []
        """Token ids of the requests of each document, if all are log-likelihoods."""
        if self.scored:
            pairs = iter(token_pairs(lm, instances))
            self.pairs = [[next(pairs) for _ in requests] for _, requests in task.documents]

    def losses(
        self, plans: Sequence[Layers], branches: Sequence[Sequence[int]], documents: range
    ) -> Iterator[list[float]]:
        """The loss of each document."""
        for plan, depths in zip(plans, branches, strict=True):
            model = self.overlays.model(plan)
            answers = self._scores(model, plan, depths, documents) if self.scored else self._answers(model, documents)
            yield self.task.losses(documents, answers)

    def _scores(self, model: Any, plan: Layers, depths: Sequence[int], documents: range) -> list[Any]:
        """Log-likelihoods, continued from cached hidden states."""
        pairs = [pair for number in documents for pair in self.pairs[number]]
        if documents != self._documents:
            self._documents = documents
            states = rows(pairs) * self.lm.model.config.hidden_size * 4
            self.prefixes = Prefixes(self.max_memory // max(1, states), self.prefixes.source)
        _, state, layers = self.prefixes.way(plan, depths)
        scores, kept = model.loglikelihood_from(pairs, state, layers)
        for states in kept:
            self.prefixes.keep(plan, states.layer_idx, states)
        return list(scores)

    def _answers(self, model: Any, documents: range) -> list[Any]:
        """Answers of any type to the requests of the documents, in order."""
        requests = [instance for number in documents for instance in self.task.documents[number][1]]
        answers: list[Any] = [None] * len(requests)
        self.lm.model = model
        for kind in dict.fromkeys(request.request_type for request in requests):
            chosen = [i for i, request in enumerate(requests) if request.request_type == kind]
            got = getattr(self.lm, kind)([requests[i] for i in chosen], disable_tqdm=True)
            for i, answer in zip(chosen, got, strict=True):
                answers[i] = answer
        return answers


def rows(pairs: Sequence[Pair]) -> int:
    """The number of tokens that are computed for requests: not the last one of each, and shared prefixes once."""
    found, previous = 0, list[int]()
    for ids in sorted(context + tokens for context, tokens in pairs if tokens):
        differ = (at for at, (a, b) in enumerate(zip(ids, previous, strict=False)) if a != b)
        common = next(differ, min(len(ids), len(previous)))
        found += len(ids) - 1 - min(common, len(ids) - 1, max(0, len(previous) - 1))
        previous = ids
    return found


def token_pairs(lm: MqadaptLM, instances: list[Any]) -> list[Pair]:
    """The token pairs that lm-eval passes to the model for log-likelihood requests, in order."""
    asked: list[Pair] = []

    def note(requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        asked.extend(lm._fit(context, continuation) for _, context, continuation in requests)
        return [(0.0, False)] * len(requests)

    lm.__dict__["_loglikelihood_tokens"] = note  # replaced on this instance while it tokenises
    try:
        lm.loglikelihood(instances, disable_tqdm=True)
    finally:
        del lm.__dict__["_loglikelihood_tokens"]
    return asked
