"""Logging to Weights & Biases. In: results of searches and evaluations. Out: a run, online or (`WANDB_MODE=offline`) on disk."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mqadapt_rs.errors import ArgumentError
from mqadapt_rs.search.core.plan_record import counts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from mqadapt_rs import Model
    from mqadapt_rs.search.core.evaluation import Evaluation
    from mqadapt_rs.search.runner import SearchResult


VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of a stored value, by dtype."""

PATIENCE = 240
"""Timeout of the start of Weights & Biases in seconds."""


class Run:
    """A run of Weights & Biases."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def evaluation(self, evaluation: Evaluation, metric: str) -> None:
        """Log one evaluated plan."""
        self._run.log({
            metric: evaluation.value,
            f"{metric}_standard_error": evaluation.standard_error,
            "damage": evaluation.damage.mean,
            "damage_standard_error": evaluation.damage.standard_error,
            "kv_bytes_per_token": evaluation.kv_bytes,
            "stopped": evaluation.stopped,
            "num_key_value_heads": counts(evaluation.plan),
            "seconds": evaluation.seconds,
        })  # fmt: skip

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set the summary values of the run."""
        self._run.summary.update(dict(values))

    def results(self, results: Mapping[str, Mapping[str, Any]], model: Model) -> None:
        """Log the metrics of lm-eval tasks (`task/metric`), and the sizes of the model."""
        values = {
            f"{task}/{key.partition(',')[0]}": value
            for task, metrics in results.items()
            for key, value in metrics.items()
            if isinstance(value, (int, float))
        }
        self._run.log(values)
        self.summary({
            **values,
            "fingerprint": model.fingerprint,
            "num_key_value_heads": list(model.plan.num_key_value_heads),
            "kv_bytes_per_token": model.kv_bytes_per_token,
            "bytes_on_disk": model.config.parameters * VALUE_BYTES[model.dtype],
        })  # fmt: skip

    def files(self, folder: Path, names: list[str]) -> None:
        """Save files with the run."""
        for name in names:
            if (folder / name).exists():
                self._run.save(str(folder / name), base_path=str(folder), policy="now")

    def result(self, result: SearchResult, bytes_on_disk: int | None) -> None:
        """Log the result of a search. `bytes_on_disk`: size of the converted winner."""
        winner = result.winner
        self.summary({
            "verdict": result.verdict,
            "bytes_on_disk": bytes_on_disk,
            "best_num_key_value_heads": None if winner is None else counts(winner.plan),
            "best_damage": None if winner is None else winner.damage.mean,
            "best_damage_standard_error": None if winner is None else winner.damage.standard_error,
            "best_kv_bytes_per_token": None if winner is None else winner.kv_bytes,
        })  # fmt: skip
        self.files(result.folder, ["best.plan.json", "summary.json", "journal.jsonl"])


@contextmanager
def tracked(
    project: str | None, *, name: str, config: Mapping[str, Any], folder: Path | None = None
) -> Iterator[Run | None]:
    """Open a run in a project; yields `None` if there is no project.

    Raises:
        ArgumentError: wandb is not installed (extra `wandb`).
    """
    if project is None:
        yield None
        return
    try:
        import wandb
    except ImportError:
        raise ArgumentError("--wandb needs Weights & Biases: pip install 'mqadapt-rs[wandb]'") from None
    # read each time: wandb caches the value of its first use
    place = os.environ.get("WANDB_DIR") or "." if folder is None else str(folder)
    # its service starts slowly when all cores are busy; a timeout would end the search
    os.environ.setdefault("WANDB__SERVICE_WAIT", str(PATIENCE))
    settings = wandb.Settings(init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", PATIENCE)))
    run = wandb.init(project=project, name=name, config=dict(config), dir=place, settings=settings)
    try:
        yield Run(run)
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
