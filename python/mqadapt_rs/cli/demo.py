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
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Download a small model, convert it with two plans and two methods, and compare size and quality. It takes some minutes."""
    from mqadapt_rs import demo as steps
    from mqadapt_rs.cli import output

    def say(line: str) -> None:
        print(readable(line), file=sys.stderr)

    with output.progress_bars("units") as progress:
        outcomes = steps.run(folder, say=say, progress=progress)
    if json:
        output.print_json([dataclasses.asdict(outcome) for outcome in outcomes])
        return
    before = outcomes[0].kv_bytes_per_token
    output.print_columns(
        f"{steps.NAME}: K/V bytes per token, perplexity of LAMBADA (8 x 512 tokens), HellaSwag (100 questions, acc_norm)",
        ["plan", "method", "K/V bytes", "saved", "perplexity", "HellaSwag"],
        [
            [
                outcome.plan,
                outcome.method,
                f"{outcome.kv_bytes_per_token:,}",
                f"{1 - outcome.kv_bytes_per_token / before:.0%}",
                f"{outcome.perplexity:.2f}",
                f"{outcome.hellaswag:.2f} ± {outcome.hellaswag_stderr:.2f}",
            ]
            for outcome in outcomes
        ],
    )
    for outcome in outcomes:
        output.print_text(f"\n{outcome.plan} {outcome.method}: {steps.PROMPT}{outcome.text}")
    output.print_text(
        f"\nThe checkpoints are in {folder}. To evaluate one: mqadapt eval {outcomes[1].folder} --tasks ..."
    )
