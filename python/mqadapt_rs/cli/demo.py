"""`mqadapt demo`."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from mqadapt_rs.cli.options import Debug, Json
from mqadapt_rs.readable import readable


def demo(
    folder: Annotated[Path, typer.Option("--output-path", help="Folder for downloads and checkpoints.")] = Path("demo"),
    questions: Annotated[
        int, typer.Option(min=0, help="HellaSwag questions to ask each model; 100 take minutes.", metavar="N")
    ] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Download a small model, convert it with two plans and two methods, and compare size and quality."""
    from mqadapt_rs import demo as steps
    from mqadapt_rs.cli import output

    def say(line: str) -> None:
        print(readable(line), file=sys.stderr)

    with output.progress_bars("units") as progress:
        outcomes = steps.run(folder, questions=questions, say=say, progress=progress)
    if json:
        output.print_json([dataclasses.asdict(outcome) for outcome in outcomes])
        return
    before = outcomes[0].kv_bytes_per_token
    title = f"{steps.NAME}: K/V bytes per token, perplexity of LAMBADA ({steps.WINDOWS} x 512 tokens)"
    columns = ["plan", "method", "K/V bytes", "saved", "perplexity"]
    rows = [
        [
            outcome.plan,
            outcome.method,
            f"{outcome.kv_bytes_per_token:,}",
            f"{1 - outcome.kv_bytes_per_token / before:.0%}",
            f"{outcome.perplexity:.2f}",
        ]
        for outcome in outcomes
    ]
    if questions:
        title += f", HellaSwag ({questions} questions, acc_norm)"
        columns.append("HellaSwag")
        for row, outcome in zip(rows, outcomes, strict=True):
            row.append(f"{outcome.hellaswag:.2f} ± {outcome.hellaswag_stderr:.2f}")
    output.print_columns(title, columns, rows)
    for outcome in outcomes:
        output.print_text(f"\n{outcome.plan} {outcome.method}: {steps.PROMPT}{outcome.text}")
    output.print_text(
        f"\nThe checkpoints are in {folder}. To evaluate one: mqadapt eval {outcomes[1].folder} --tasks ..."
    )
