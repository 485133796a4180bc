"""`mqadapt generate`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from mqadapt_rs.calibration import CalibrationOptions
from mqadapt_rs.cli.calibration import load_model, with_calibration
from mqadapt_rs.cli.options import Debug, DType, Family, Json, Kv, Method, PlanText, Seed, Src, Weights


@with_calibration
def generate(
    src: Src,
    prompt: Annotated[str, typer.Option("--prompt", help="The text to continue.", show_default=False)],
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Largest number of generated tokens.")
    ] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="Sampling temperature; 0 always takes the most likely token.")
    ] = 0.0,
    seed: Seed = 0,
    plan: PlanText = "keep",
    method: Method = "mean",
    dtype: DType = None,
    weights: Weights = "stored",
    kv: Kv = None,
    *,
    calibration: CalibrationOptions,
    family: Family = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text from a prompt.

    On a terminal, control characters other than line breaks and tabs are printed as escape codes. A file or another program
    receives the exact text.
    """
    from mqadapt_rs import text as texts
    from mqadapt_rs.cli import output

    tokenizer = texts.load_tokenizer(src)
    ids = texts.token_ids(tokenizer, prompt)
    model = load_model(src, calibration, plan=plan, method=method, seed=seed, dtype=dtype, weights=weights, kv=kv)
    start = time.perf_counter()
    with output.progress_bars("tokens") as progress:
        new = model.generate(ids, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, progress=progress)
    text = tokenizer.decode(new, skip_special_tokens=True)
    if json:
        output.print_json(
            {"prompt": prompt, "text": text, "tokens": len(new), "ids": new, "seconds": time.perf_counter() - start}
        )
    else:
        output.print_text(f"{prompt}{text}")
