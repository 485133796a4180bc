"""Evaluation with lm-eval: its tasks from Python, and its own command line."""

from __future__ import annotations

import sys
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mqadapt_rs.arguments import real, whole
from mqadapt_rs.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lm_eval.tasks import TaskManager

    from mqadapt_rs.lm_eval.model import MqadaptLM


def evaluate(
    lm: MqadaptLM,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    output_path: str | Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Run tasks as `lm-eval run` does.

    Args:
        lm: the model.
        tasks: names of tasks, or of groups of tasks.
        include_path: a folder with more tasks.
        output_path: path of the results file of lm-eval (a folder, or a `.json` file).
        options: options of `lm_eval.simple_evaluate`: `limit`, `num_fewshot`, `use_cache`, `apply_chat_template`, ...

    Returns:
        The results of lm-eval: `results` holds the metrics of each task.

    Raises:
        ArgumentError: a task does not exist, or a number is out of range.
    """
    if options.get("limit") is not None:
        real("limit", options["limit"])
    whole("num_fewshot", options.get("num_fewshot"))

    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    manager = task_manager(tasks, None if include_path is None else str(include_path))
    tracker = None if output_path is None else EvaluationTracker(output_path=str(output_path))
    options.setdefault("torch_random_seed", None)  # PyTorch is not used, and seeding would import it
    options.setdefault("log_samples", False)
    _describe_machine_only_when_asked()
    asked = _describes_machine.set(tracker is not None)
    try:
        results = simple_evaluate(
            model=lm,
            model_args={"pretrained": lm.pretrained},
            tasks=manager.match_tasks(list(tasks)),
            task_manager=manager,
            evaluation_tracker=tracker,
            **options,
        )
    finally:
        _describes_machine.reset(asked)
    if tracker is not None:
        tracker.save_results_aggregated(results=results, samples=results.get("samples"))
    return dict(results)


def task_manager(tasks: Sequence[str], include_path: str | None) -> TaskManager:
    """Read the tasks of `include_path`, and those of lm-eval if they are needed: reading those takes seconds.

    Raises:
        ArgumentError: a task does not exist.
    """
    if include_path is not None and tasks:
        manager = _read_tasks(include_path, own_only=True)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = _read_tasks(include_path, own_only=False)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown or not tasks:
        raise ArgumentError(
            f"no such task: {', '.join(unknown) or '(none given)'}; `mqadapt lm-eval ls tasks` lists lm-eval's own, "
            "--include-path names a folder with more"
        )
    return manager


@lru_cache(maxsize=8)  # a search evaluates the same tasks repeatedly
def _read_tasks(include_path: str | None, own_only: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=not own_only)


# lm-eval describes the machine in every result. For that it imports PyTorch and starts a dozen programs, which takes longer than
# many evaluations, and only a results file keeps the description.
_describes_machine: ContextVar[bool] = ContextVar("describes_machine", default=True)


@lru_cache(maxsize=1)
def _describe_machine_only_when_asked() -> None:
    from lm_eval import evaluator

    original = getattr(evaluator, "add_env_info", None)
    if original is None:
        return

    def add_env_info(storage: dict[str, Any]) -> None:
        if _describes_machine.get():
            original(storage)

    evaluator.add_env_info = add_env_info


def main(argv: Sequence[str]) -> None:
    """Run the command line of lm-eval, with `--model mqadapt`."""
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["mqadapt lm-eval", *argv]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
