"""`mqadapt perplexity`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from mqadapt_rs.calibration import CalibrationOptions
from mqadapt_rs.cli.calibration import load_model, with_calibration
from mqadapt_rs.cli.options import Debug, DType, Family, Json, Kv, Method, PlanText, Seed, Src, Weights


@with_calibration
def perplexity(
    src: Src,
    text: Annotated[
        Path,
        typer.Option("--text", exists=True, dir_okay=False, help="Plain text, or .jsonl[.gz].", show_default=False),
    ],
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens per window.")] = 512,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, help="Evaluate the first N windows only.", show_default="all")
    ] = None,
    field: Annotated[str, typer.Option("--field", help="Name of the text field in a .jsonl file.")] = "text",
    plan: PlanText = "keep",
    method: Method = "mean",
    seed: Seed = 0,
    dtype: DType = None,
    weights: Weights = "stored",
    kv: Kv = None,
    *,
    calibration: CalibrationOptions,
    family: Family = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure the perplexity of a text, optionally under a plan.

    The documents are concatenated, tokenised with the default settings of the tokenizer and cut into windows that do not
    overlap. The mean is over all tokens of a window except the first.
    """
    from mqadapt_rs import text as texts
    from mqadapt_rs.cli import output

    ids = texts.read_ids(texts.load_tokenizer(src), text, field, None if windows is None else windows * context)
    ids = texts.first_windows(ids, context, windows)
    model = load_model(src, calibration, plan=plan, method=method, seed=seed, dtype=dtype, weights=weights, kv=kv)
    start = time.perf_counter()
    with output.progress_bars("windows") as progress:
        value = model.perplexity(ids, context=context, progress=progress)
    count = len(ids) // context
    result = {
        "perplexity": value,
        "tokens": count * (context - 1),
        "windows": count,
        "context": context,
        "seconds": time.perf_counter() - start,
    }
    if json:
        output.print_json(result)
        return
    output.print_table(
        src,
        {
            "perplexity": f"{value:.4f}",
            "predicted tokens": f"{result['tokens']:,} ({count} windows of {context})",
            "seconds": f"{result['seconds']:.1f}",
        },
    )
