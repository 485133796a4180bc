"""`mqadapt search`, `mqadapt plot` and `mqadapt report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mqadapt_rs.cli.calibrated import Calibrated, calibrated
from mqadapt_rs.cli.options import Debug, DType, Json, Method, Seed, Src, Weights

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
Folder = Annotated[Path, typer.Argument(help="The folder of a search.", exists=True, file_okay=False)]
Latency = Annotated[
    Path | None,
    typer.Option(
        "--latency",
        exists=True,
        dir_okay=False,
        help="What 'mqadapt bench --groups ... --json' wrote, for the figure of latency.",
        show_default=False,
    ),
]


def _option(name: str, text: str, **more: Any) -> Any:
    return typer.Option(f"--{name}", help=text, show_default=more.pop("show_default", False), **more)


@calibrated
def search(
    src: Src,
    strategy: Strategy,
    out: Annotated[Path, _option("out", "The folder for journal, best.plan.json and summary.json.", file_okay=False)],
    metric: Metric = "kl",
    method: Method = "mean",
    text: Annotated[
        str | None,
        _option("text", "For kl and perplexity, where it is not --calibration; a file or a data set as that."),
    ] = None,
    field: Annotated[str, typer.Option("--field", help="The field of a .jsonl file that holds the text.")] = "text",
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens of a window.")] = 512,
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows of the text.")] = 16,
    include_path: Annotated[
        Path | None, _option("include-path", "A folder of own lm-eval tasks.", exists=True, file_okay=False)
    ] = None,
    limit: Annotated[int | None, _option("limit", "Only the first N documents of the task.", min=1)] = None,
    num_fewshot: Annotated[int | None, _option("num-fewshot", "Examples in the prompt.", min=0)] = None,
    counts: Annotated[str | None, _option("counts", "K/V heads that layers may be reduced to, such as 1,2.")] = None,
    kv_budget: Annotated[
        str | None, _option("kv-budget", "Most K/V bytes per token: a share such as 50%, or bytes.")
    ] = None,
    latency_budget: Annotated[
        str | None, _option("latency-budget", "Most time of a decoded token, measured here: a share such as 90%.")
    ] = None,
    depth: Annotated[int, typer.Option("--depth", min=1, help="Tokens in the cache when times are measured.")] = 1024,
    max_damage: Annotated[float | None, _option("max-damage", "Most damage, in the metric's unit.")] = None,
    points: Annotated[int | None, _option("points", "Points of the Pareto front.", min=1)] = None,
    swaps: Annotated[
        int | None, _option("swaps", "Neighbours that each round of local search measures.", min=0)
    ] = None,
    trials: Annotated[int | None, _option("trials", "Random plans.", min=1)] = None,
    plan: Annotated[
        list[str] | None, _option("plan", "A plan that the strategy 'given' measures; repeat it for more.")
    ] = None,
    seed: Seed = 0,
    error_rate: Annotated[
        float, typer.Option("--error-rate", min=0, max=0.49, help="Of early stopping; 0 stops nothing early.")
    ] = 0.05,
    dtype: DType = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cpu-stock or cuda:N.")] = "cpu",
    weights: Weights = "stored",
    max_memory: Annotated[
        int, typer.Option("--max-memory", min=1, help="MiB of hidden states kept beside the model.")
    ] = 1024,
    workers: Annotated[int | None, _option("workers", "Evaluate in this many processes.", min=1)] = None,
    ray: Annotated[
        str | None, _option("ray", "Evaluate on the Ray cluster of this address; 'local' starts one here.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the journal in the folder.")] = False,
    wandb: Annotated[str | None, _option("wandb", "Log to this Weights & Biases project.")] = None,
    *,
    calibration: Calibrated,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Search for the layers that can do with fewer K/V heads, by trying plans in memory."""
    from mqadapt_rs import ModelConfig
    from mqadapt_rs.cli import output
    from mqadapt_rs.search import search as run
    from mqadapt_rs.search.progress import live

    source = tuple(ModelConfig.load(src).num_key_value_heads)
    with live(source) as watcher:
        result = run(
            src,
            strategy=strategy,
            out=out,
            metric=metric,
            method=method,
            **{
                **calibration.values,
                "calibration_context": calibration.context,
                "target_context": calibration.target_context,
            },
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
        output.print_text(f"{result.folder / 'best.plan.json'} can go straight into 'mqadapt convert --plan'.")


def _numbers(name: str, text: str) -> list[int]:
    from mqadapt_rs import ArgumentError

    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ArgumentError(f"--{name} {text}: expected whole numbers joined by commas, such as 1,2") from None


def plot(
    folders: Annotated[
        list[Path],
        typer.Argument(
            help="Folders of searches; several are drawn into the same figures.", exists=True, file_okay=False
        ),
    ],
    out: Annotated[Path | None, _option("out", "Where the files go; by default 'plots' in the first folder.")] = None,
    latency: Latency = None,
    debug: Debug = False,
) -> None:
    """Draw the figures of searches, as PNG and SVG."""
    from mqadapt_rs.cli import output
    from mqadapt_rs.plots import plot as draw

    for file in draw(*folders, out=out, latency=latency):
        output.print_text(str(file))


def report(folder: Folder, latency: Latency = None, debug: Debug = False) -> None:
    """Write one page about a search, as HTML and as Markdown (a model card)."""
    from mqadapt_rs.cli import output
    from mqadapt_rs.report import report as write

    for file in write(folder, latency=latency):
        output.print_text(str(file))
