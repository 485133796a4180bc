"""Running lm-eval: its tasks from Python, and its own command line. The model is in `harness.py`, which is imported first."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mqadapt_rs.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mqadapt_rs.harness import MqadaptLM


def evaluate(
    lm: MqadaptLM,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    output_path: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Runs tasks as `lm-eval run` does.

    Args:
        lm: the model.
        tasks: names of tasks, or of groups of tasks.
        include_path: a folder with more tasks.
        output_path: where lm-eval shall write its results file (a folder, or a `.json` file).
        options: what `lm_eval.simple_evaluate` takes: `limit`, `num_fewshot`, `use_cache`, `apply_chat_template`, ...

    Returns:
        lm-eval's results: `results` holds the metrics of each task.

    Raises:
        ArgumentError: a task that does not exist.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise ArgumentError(
            f"no such task: {', '.join(unknown) or '(none given)'}; `mqadapt lm-eval ls tasks` lists lm-eval's own, "
            "--include-path names a folder with more"
        )
    tracker = None if output_path is None else EvaluationTracker(output_path=str(output_path))
    options.setdefault("torch_random_seed", None)  # nothing of ours draws from PyTorch, and seeding it would import it
    options.setdefault("log_samples", False)
    results = simple_evaluate(
        model=lm,
        model_args={"pretrained": lm.pretrained},
        tasks=manager.match_tasks(list(tasks)),
        task_manager=manager,
        evaluation_tracker=tracker,
        **options,
    )
    if tracker is not None:
        tracker.save_results_aggregated(results=results, samples=results.get("samples"))
    return dict(results)


def main(argv: Sequence[str]) -> None:
    """lm-eval's own command line, with `--model mqadapt`."""
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["mqadapt lm-eval", *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
