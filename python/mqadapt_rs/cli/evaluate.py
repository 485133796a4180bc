"""`mqadapt eval` and `mqadapt lm-eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mqadapt_rs.calibration import CalibrationOptions
from mqadapt_rs.cli.calibration import with_calibration
from mqadapt_rs.cli.options import Debug, DType, Family, Json, Kv, Method, PlanText, Seed, Src, Weights

# keys of the result of lm-eval that are printed; the others repeat the definitions of the tasks
_KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")


@with_calibration
def evaluate(
    src: Src,
    tasks: Annotated[
        str, typer.Option("--tasks", help="Names of lm-eval tasks, separated by commas.", show_default=False)
    ],
    plan: PlanText = "keep",
    method: Method = "mean",
    seed: Seed = 0,
    dtype: DType = None,
    weights: Weights = "stored",
    kv: Kv = None,
    *,
    calibration: CalibrationOptions,
    include_path: Annotated[
        Path | None,
        typer.Option(
            "--include-path", exists=True, file_okay=False, help="A folder with custom tasks.", show_default=False
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            "--limit",
            min=0,
            help="Evaluate the first N documents only; below 1, that fraction of them.",
            show_default="all",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option("--num-fewshot", min=0, help="Number of examples in the prompt.", show_default="the task's"),
    ] = None,
    output_path: Annotated[
        Path | None,
        typer.Option("--output-path", help="Folder or .json file for the results of lm-eval.", show_default=False),
    ] = None,
    wandb: Annotated[
        str | None,
        typer.Option("--wandb", help="Log to this Weights & Biases project.", show_default=False),
    ] = None,
    family: Family = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Evaluate a model on lm-eval tasks, optionally under a plan."""
    from mqadapt_rs.cli import output
    from mqadapt_rs.lm_eval import MqadaptLM
    from mqadapt_rs.lm_eval import evaluate as run_tasks
    from mqadapt_rs.tracking import tracked

    text_or_stats = calibration.load(src, seed)
    settings = {
        "source": src,
        "plan": plan,
        "method": method,
        "seed": seed,
        "weights": weights,
        "kv": kv,
        "tasks": tasks,
        "limit": limit,
        "num_fewshot": num_fewshot,
    }
    with tracked(wandb, name=f"eval {plan} {method}", config=settings) as run:
        lm = MqadaptLM(
            src, plan=plan, method=method, seed=seed, dtype=dtype, weights=weights, kv=kv, calibration=text_or_stats
        )
        results = run_tasks(
            lm,
            [name.strip() for name in tasks.split(",") if name.strip()],
            include_path=include_path,
            output_path=output_path,
            limit=limit,
            num_fewshot=num_fewshot,
        )
        if run is not None:
            run.results(results["results"], lm.model)
    if json:
        output.print_json({key: results[key] for key in _KEPT if key in results})
        return
    output.print_columns(src, ["task", "metric", "value", "standard error"], _rows(results["results"]))


def _rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each metric of each task; lm-eval's keys are `metric,filter` and `metric_stderr,filter`."""
    rows = []
    for task, values in results.items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr") or not isinstance(value, float):
                continue
            error = values.get(f"{metric}_stderr,{filtered}")
            rows.append([task, metric, f"{value:.4f}", f"{error:.4f}" if isinstance(error, float) else ""])
    return rows


def lm_eval(context: typer.Context) -> None:
    """Run the command line of lm-eval, with the model `mqadapt` registered."""
    from mqadapt_rs.lm_eval import main

    main(context.args)
