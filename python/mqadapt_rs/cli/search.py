"""`mqadapt search`, `mqadapt plot` and `mqadapt report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mqadapt_rs.calibration import CalibrationOptions
from mqadapt_rs.cli.calibration import with_calibration
from mqadapt_rs.cli.options import Debug, DType, Family, Json, Method, Seed, Src, Weights

Strategy = Annotated[
    str,
    typer.Option(
        "--strategy",
        help="sensitivity, from-end, alternate, greedy, budget, pareto, given or random.",
        show_default=False,
    ),
]
Metric = Annotated[
    str,
    typer.Option("--metric", help="kl, perplexity, predicted, or task:NAME/METRIC such as task:hellaswag/acc_norm."),
]
Folder = Annotated[Path, typer.Argument(help="Folder of a search.", exists=True, file_okay=False)]
Latency = Annotated[
    Path | None,
    typer.Option(
        "--latency",
        exists=True,
        dir_okay=False,
        help="Output of 'mqadapt bench --groups ... --json', for the latency figure.",
        show_default=False,
    ),
]


def _option(name: str, text: str, **more: Any) -> Any:
    return typer.Option(f"--{name}", help=text, show_default=more.pop("show_default", False), **more)


@with_calibration
def search(
    src: Src,
    strategy: Strategy,
    out: Annotated[Path, _option("out", "Folder for journal.jsonl, best.plan.json and summary.json.", file_okay=False)],
    metric: Metric = "kl",
    method: Method = "mean",
    text: Annotated[
        str | None,
        _option(
            "text", "Evaluation text of kl and perplexity: a file or a data set; by default that of --calibration."
        ),
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Name of the text field in a .jsonl file.")] = "text",
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens per window.")] = 512,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Number of windows.")] = 16,
    include_path: Annotated[
        Path | None, _option("include-path", "A folder with custom lm-eval tasks.", exists=True, file_okay=False)
    ] = None,
    limit: Annotated[int | None, _option("limit", "Evaluate the first N documents of the task only.", min=1)] = None,
    num_fewshot: Annotated[int | None, _option("num-fewshot", "Number of examples in the prompt.", min=0)] = None,
    counts: Annotated[
        str | None, _option("counts", "Numbers of K/V heads that layers may be reduced to, for instance 1,2.")
    ] = None,
    kv_budget: Annotated[
        str | None, _option("kv-budget", "Limit of K/V bytes per token: a share such as 50%, or bytes.")
    ] = None,
    latency_budget: Annotated[
        str | None,
        _option(
            "latency-budget", "Limit of the latency of a decoded token, measured on this machine: a share such as 90%."
        ),
    ] = None,
    depth: Annotated[
        int, typer.Option("--depth", min=1, help="Number of cached tokens at which latency is measured.")
    ] = 1024,
    max_damage: Annotated[
        float | None, _option("max-damage", "Limit of the damage, in the unit of the metric.")
    ] = None,
    points: Annotated[int | None, _option("points", "Number of points of the Pareto front.", min=1)] = None,
    swaps: Annotated[
        int | None, _option("swaps", "Number of neighbours that each round of local search evaluates.", min=0)
    ] = None,
    trials: Annotated[int | None, _option("trials", "Number of random plans.", min=1)] = None,
    plan: Annotated[
        list[str] | None, _option("plan", "A plan that the strategy 'given' evaluates; repeatable.")
    ] = None,
    seed: Seed = 0,
    error_rate: Annotated[
        float, typer.Option("--error-rate", min=0, max=0.49, help="Error rate of early stopping; 0 disables it.")
    ] = 0.05,
    dtype: DType = None,
    device: Annotated[str, typer.Option("--device", help="Device: cpu, cpu-stock or cuda:N.")] = "cpu",
    weights: Weights = "stored",
    max_memory: Annotated[
        int, typer.Option("--max-memory", min=1, help="MiB for hidden states kept in memory.")
    ] = 1024,
    workers: Annotated[int | None, _option("workers", "Number of worker processes.", min=1)] = None,
    ray: Annotated[
        str | None,
        _option("ray", "Address of a Ray cluster that evaluates the plans; 'local' starts one on this machine."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Resume the search whose journal is in the folder.")] = False,
    wandb: Annotated[str | None, _option("wandb", "Log to this Weights & Biases project.")] = None,
    *,
    calibration: CalibrationOptions,
    family: Family = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Search for the layers that can have fewer K/V heads, by evaluating plans in memory."""
    from mqadapt_rs import Plan
    from mqadapt_rs.cli import output
    from mqadapt_rs.search import search as run
    from mqadapt_rs.search.progress import live

    with live(Plan.parse("keep", src)) as watcher:
        result = run(
            src,
            strategy=strategy,
            out=out,
            metric=metric,
            method=method,
            **calibration.keywords(),
            text=text,
            field=field,
            context=context,
            windows=windows,
            include_path=include_path,
            limit=limit,
            num_fewshot=num_fewshot,
            counts=None if counts is None else _numbers("counts", counts),
            kv_budget=kv_budget,
            latency_budget=latency_budget,
            depth=depth,
            max_damage=max_damage,
            points=points,
            swaps=swaps,
            trials=trials,
            plans=plan,
            seed=seed,
            error_rate=error_rate or None,
            dtype=dtype,
            device=device,
            weights=weights,
            max_memory=max_memory << 20,
            workers=workers,
            ray="" if ray == "local" else ray,
            resume=resume,
            wandb=wandb,
            watcher=watcher,
        )
    if json:
        import json as json_module

        output.print_json(json_module.loads((result.folder / "summary.json").read_text()))
        return
    output.print_text(result.verdict)
    if result.winner is not None:
        output.print_text(
            f"{result.folder / 'best.plan.json'} is a plan file for 'mqadapt convert --plan': it has the method and its options."
        )


def _numbers(name: str, text: str) -> list[int]:
    from mqadapt_rs import ArgumentError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(f"--{name} {text}: expected whole numbers joined by commas, such as 1,2") from None


def plot(
    folders: Annotated[
        list[Path],
        typer.Argument(help="Folders of searches; several share the same figures.", exists=True, file_okay=False),
    ],
    out: Annotated[Path | None, _option("out", "Output folder; by default 'plots' in the first folder.")] = None,
    latency: Latency = None,
    debug: Debug = False,
) -> None:
    """Plot the results of searches, as PNG and SVG."""
    from mqadapt_rs.cli import output
    from mqadapt_rs.plots import plot as draw

    for file in draw(*folders, out=out, latency=latency):
        output.print_text(str(file))


def report(folder: Folder, latency: Latency = None, debug: Debug = False) -> None:
    """Write the report of a search, as HTML and as Markdown (a model card)."""
    from mqadapt_rs.cli import output
    from mqadapt_rs.report import report as write

    for file in write(folder, latency=latency):
        output.print_text(str(file))
