"""`mqadapt bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mqadapt_rs.cli.options import Debug, DType, Family, Json, Kv, Src, Weights


def _counts(text: str) -> list[int]:
    """Whole numbers separated by commas."""
    try:
        counts = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of numbers separated by commas") from None
    if any(count < 1 for count in counts):
        raise typer.BadParameter(f"{text!r}: every number must be 1 or more")
    return counts


def bench(
    src: Src,
    plan: Annotated[
        list[str] | None,
        typer.Option("--plan", help="A plan to measure beside the source; repeatable.", show_default=False),
    ] = None,
    groups: Annotated[
        str,
        typer.Option("--groups", help="Numbers of K/V heads to give all layers, for instance 1,3.", show_default=False),
    ] = "",
    depth: Annotated[
        str, typer.Option("--depth", help="Numbers of cached tokens at which decoding is measured.")
    ] = "64,2048",
    prompt: Annotated[str, typer.Option("--prompt", help="Prompt lengths in tokens.")] = "512",
    steps: Annotated[int, typer.Option("--steps", min=1, help="Tokens decoded per round.")] = 32,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Number of rounds; the fastest counts.")] = 3,
    dtype: DType = None,
    weights: Weights = "stored",
    kv: Kv = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Plot the decoding times into this file.", show_default=False)
    ] = None,
    family: Family = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the speed of a model and of plans on this machine: prompts, decoded tokens, K/V cache."""
    from mqadapt_rs.bench import bench as measure
    from mqadapt_rs.cli import output

    if plot is not None:  # refused before the measurement
        if plot.suffix not in {".png", ".svg", ".pdf"}:
            raise typer.BadParameter(f"{plot}: expected a name that ends in .png, .svg or .pdf", param_hint="--plot")
        import matplotlib as _  # noqa: F401
    with output.progress_bars("rounds") as progress:
        report = measure(
            src,
            plan or [],
            groups=_counts(groups),
            depths=_counts(depth),
            prompts=_counts(prompt),
            steps=steps,
            rounds=rounds,
            dtype=dtype,
            weights=weights,
            kv=kv,
            progress=progress,
        )
    if plot is not None:
        from mqadapt_rs.plots import plot_latency

        plot_latency(report, plot)
    if json:
        output.print_json(report)
        return
    times = {(row["plan"], row["depth"]): row for row in report["decode"]}
    speeds = {(row["plan"], row["tokens"]): row["tokens_per_second"] for row in report["prefill"]}
    prompts = list(dict.fromkeys(row["tokens"] for row in report["prefill"]))
    depths = list(dict.fromkeys(row["depth"] for row in report["decode"]))
    header = ["plan", "K/V per token", *(f"prompt of {n:,}" for n in prompts), *(f"decode at {n:,}" for n in depths)]
    kind = report["dtype"] if report["weights"] == "stored" else f"{report['dtype']}, weights {report['weights']}"
    rows = [
        [
            one["plan"],
            output.in_bytes(one["kv_bytes_per_token"]),
            *(f"{speeds[one['plan'], n]:,.0f}/s" for n in prompts),
            *(
                f"{times[one['plan'], n]['tokens_per_second']:,.1f}/s {times[one['plan'], n]['speedup']:.2f}x"
                for n in depths
            ),
        ]
        for one in report["plans"]
    ]
    output.print_columns(f"{src}, {kind}: tokens per second", header, rows)
