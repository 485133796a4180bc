"""The specification from which each worker builds its evaluator: model, method and data.

In: the arguments of a search. Out: an evaluator, the same in every process.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mqadapt_rs._core import register_family, registered_families
from mqadapt_rs.errors import ArgumentError
from mqadapt_rs.search.core import plan_record
from mqadapt_rs.search.core.evaluation import Metric
from mqadapt_rs.search.core.space import Space
from mqadapt_rs.search.evaluators.overlays import PlanOverlays
from mqadapt_rs.search.evaluators.predicted import METRIC as PREDICTED
from mqadapt_rs.search.evaluators.predicted import PredictedEvaluator
from mqadapt_rs.search.evaluators.prefix_cache import Prefixes
from mqadapt_rs.search.evaluators.windows import WindowEvaluator

if TYPE_CHECKING:
    from mqadapt_rs import Calibration, Model
    from mqadapt_rs.calibration import CalibrationOptions
    from mqadapt_rs.search.core.evaluation import Evaluator
    from mqadapt_rs.search.evaluators.data import Data
    from mqadapt_rs.search.evaluators.tasks import TaskEvaluator

    ModelEvaluator = WindowEvaluator | TaskEvaluator | PredictedEvaluator

METRICS = {
    "kl": Metric("kl", "nats per token", "nats per token"),
    "perplexity": Metric("perplexity", "perplexity", "nats per token of log-perplexity", "exp"),
}
GROUP = 8
"""Largest number of plans whose final hidden states are held, so that the logits of the source are computed once for them."""


@dataclass(frozen=True)
class ModelSpec:
    """Model, method and data of a search."""

    src: str
    metric_name: str
    data: Data
    method: str = "mean"
    seed: int = 0
    dtype: str | None = None
    device: str = "cpu"
    weights: str = "stored"
    max_memory: int = 1 << 30
    calibration: CalibrationOptions | None = None
    # set when the evaluator is built for the first time
    metric: Metric = METRICS["kl"]
    documents: int = 0
    group: int = 1
    prints: tuple[tuple[str, str], ...] = ()
    families: tuple[tuple[str | None, str], ...] = field(default_factory=lambda: tuple(registered_families()))

    def fingerprints(self) -> dict[str, str]:
        """Everything that the losses depend on except the plan."""
        return dict(self.prints)

    def build(self) -> Evaluator:
        """Load model and data, in whatever process this is."""
        for model_type, family in self.families:
            register_family(model_type, family)
        return self.load()[0]

    def load(self) -> tuple[ModelEvaluator, Model, ModelSpec]:
        """Load the evaluator and its model; also returns the completed specification.

        Raises:
            ArgumentError: a metric, text or task does not exist, or the text is too short.
        """
        if self.metric_name in METRICS:
            return self._windows()
        if self.metric_name == PREDICTED.name:
            return self._predicted()
        if self.metric_name.startswith("task:"):
            return self._task()
        raise ArgumentError(
            f"there is no metric '{self.metric_name}': expected {', '.join(METRICS)}, {PREDICTED.name} or task:NAME/METRIC, "
            "such as task:hellaswag/acc_norm"
        )

    def overlays(self, model: Model) -> PlanOverlays:
        """The overlays of a loaded model."""
        refits = self.calibration is not None and self.calibration.refits
        return PlanOverlays(model, self.method, self.seed, self._calibration(), together=refits)

    def try_out(self, evaluator: ModelEvaluator, space: Space) -> None:
        """Merge one layer, to refuse an invalid method and to collect statistics before the workers need them.

        Raises:
            ArgumentError: the method is invalid for this model.
        """
        layer = next(idx for idx in range(space.num_hidden_layers) if len(space.choices(idx)) > 1)
        plan = space.single(layer, space.choices(layer)[0])
        if self.calibration is not None and self.calibration.stats is not None:
            Path(self.calibration.stats).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(evaluator, PredictedEvaluator):
            list(evaluator.losses([plan], [()], range(1)))
        elif self.calibration is not None and self.calibration.refits:
            # statistics do not depend on the refit
            once = replace(self, calibration=replace(self.calibration, sequential=False, refine=0))
            once.overlays(evaluator.overlays.source).model(plan)
        else:
            evaluator.overlays.model(plan)

    def _model(self) -> Model:
        from mqadapt_rs import Model

        return Model.load(self.src, dtype=self.dtype, device=self.device, weights=self.weights)

    def _calibration(self) -> Calibration | None:
        return None if self.calibration is None else self.calibration.load(self.src, self.seed)

    def _predicted(self) -> tuple[PredictedEvaluator, Model, ModelSpec]:
        model = self._model()
        return self._predictor(model), model, replace(self, metric=PREDICTED, prints=self._prints(model, []))

    def _predictor(self, model: Model) -> PredictedEvaluator:
        calibration = self._calibration()
        if calibration is None:
            raise ArgumentError("the metric predicted needs statistics: --calibration FILE or --stats FILE")
        return PredictedEvaluator(self.src, self.method, calibration, tuple(model.plan.layers))

    def _windows(self) -> tuple[WindowEvaluator, Model, ModelSpec]:
        windows = read_windows(self.src, self.data, self.seed)
        overlays = self.overlays(self._model())
        model = overlays.source
        # number of hidden states of all windows that fit into memory, without those of the source
        states = len(windows) * self.data.context * model.config.hidden_size * 4
        held = self.max_memory // states - 1
        if held < 1:
            raise ArgumentError(
                f"--max-memory {self.max_memory:,} is too little: the hidden states of {len(windows)} windows take "
                f"{states:,} bytes, and two of them are needed"
            )
        group = max(1, min(GROUP, held // 2)) if self.metric_name == "kl" else 1
        source = tuple(model.plan.layers)
        evaluator = WindowEvaluator(overlays, windows, self.metric_name, Prefixes(held - group, source))
        spec = replace(
            self,
            metric=METRICS[self.metric_name],
            documents=len(windows),
            group=group,
            prints=self._prints(model, windows),
        )
        return evaluator, model, spec

    def _task(self) -> tuple[TaskEvaluator, Model, ModelSpec]:
        from mqadapt_rs.lm_eval import MqadaptLM
        from mqadapt_rs.search.evaluators.tasks import Task, TaskEvaluator

        lm = MqadaptLM(self.src, dtype=self.dtype, device=self.device, weights=self.weights)
        task = Task.load(self.metric_name.removeprefix("task:"), self.data, self.seed, lm)
        model = lm.model
        evaluator = TaskEvaluator(self.overlays(model), lm, task, self.max_memory)
        spec = replace(
            self,
            metric=task.metric,
            documents=len(task.documents),
            prints=self._prints(model, [task.shots, [[i.args for i in requests] for _, requests in task.documents]]),
        )
        return evaluator, model, spec

    def _prints(self, model: Model, data: Any) -> tuple[tuple[str, str], ...]:
        from mqadapt_rs import __version__

        digest = hashlib.sha256(json.dumps(data, default=str).encode()).hexdigest()[:16]
        method = self.method if self.method != "random" else f"{self.method} (seed {self.seed})"
        calibration = () if self.calibration is None else (("calibration", self._calibration_in_words()),)
        return (
            ("name", _called(self.src)),
            ("model", model.fingerprint),
            ("text", f"{digest} ({self._data_in_words()})"),
            ("method", method),
            *(() if self.weights == "stored" else (("weights", self.weights),)),
            *calibration,
            ("version", __version__),
        )

    def _calibration_in_words(self) -> str:
        data = self.calibration
        if data is None or data.text is None:
            return "saved statistics"
        windows = ", ".join(map(str, data.context))
        targets = "" if data.target_context is None else f", target context {', '.join(map(str, data.target_context))}"
        refit = f", refined in {data.refine} steps" if data.refine else ", refitted" if data.sequential else ""
        return f"{data.tokens} tokens of {_called(data.text)} in windows of {windows}{targets}{refit}"

    def _data_in_words(self) -> str:
        data = self.data
        if self.metric_name == PREDICTED.name:
            return "none"
        if data.text is not None and self.metric_name in METRICS:
            return f"{_called(data.text)}, windows of {data.context} tokens"
        return "all documents" if data.limit is None else f"the first {data.limit} documents"


def _called(place: str) -> str:
    """The name of a file without its folder, or a hub id."""
    return Path(place).name if Path(place).exists() else place


def read_windows(src: str, data: Data, seed: int) -> list[list[int]]:
    """Read the first windows of a text, in a random order that depends on the seed alone.

    Raises:
        ArgumentError: there is no text, or it is too short.
    """
    from mqadapt_rs import text
    from mqadapt_rs.calibration import documents

    if data.text is None:
        raise ArgumentError("the metrics kl and perplexity need a text: --text FILE, or --calibration FILE")
    tokens = sys.maxsize if data.windows is None else data.windows * data.context
    ids = text.token_ids(text.load_tokenizer(src), "".join(documents(data.text, data.field, tokens)))
    ids = text.first_windows(ids, data.context, data.windows)
    found = [list(ids[start : start + data.context]) for start in range(0, len(ids), data.context)]
    random.Random(seed).shuffle(found)
    return found


def space_of(model: Model, counts: tuple[int, ...] | None) -> Space:
    """The space of a model; bytes are those of the dtype in which the model computes its K/V cache."""
    config = model.config
    table = tuple(
        {choice: choice.bytes_per_token(config, model.kv_value_bytes) for choice in config.layer_caches(layer_idx)}
        for layer_idx in range(config.num_hidden_layers)
    )
    allowed = None if counts is None else plan_record.layers(counts)
    return Space(tuple(model.plan.layers), table, allowed)
