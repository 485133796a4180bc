"""Options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mqadapt_rs import Calibration

_debug_wanted: list[bool] = []


def _note_debug(value: bool) -> bool:
    _debug_wanted.append(value)
    return value


def debug_wanted() -> bool:
    """Whether `--debug` was given."""
    return any(_debug_wanted)


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def byte_count(text: str) -> int:
    """Bytes of a size such as `5GB`, `64MiB` or `1000`."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?I?)B?", str(text).strip().upper())
    if match is None or match[2] not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a size such as 5GB, 64MiB or 1000")
    return int(match[1]) * _UNITS[match[2]]


Src = Annotated[str, typer.Argument(help="A folder, a .gguf file or a hub id org/name[@revision].", show_default=False)]
PlanText = Annotated[
    str,
    typer.Option(
        "--plan",
        help="K/V heads of each layer: 'keep', 'mqa:last8', 'gqa2:0,3-7; mqa:alternate4', '1, 0, ...', or a plan file "
        "(.json, .yaml).",
    ),
]
Method = Annotated[
    str,
    typer.Option(
        "--method",
        help="How K/V heads are merged: mean, first, random; closed-form and prune, which need --calibration or --stats.",
    ),
]
CalibrationText = Annotated[
    Path | None,
    typer.Option(
        "--calibration",
        exists=True,
        dir_okay=False,
        help="Text for closed-form and prune: plain, or .jsonl[.gz].",
        show_default=False,
    ),
]
CalibrationField = Annotated[
    str, typer.Option("--calibration-field", help="The field of a .jsonl file that holds the text.")
]
CalibrationTokens = Annotated[int, typer.Option("--calibration-tokens", min=1, help="Tokens drawn from the text.")]
CalibrationContext = Annotated[int, typer.Option("--calibration-context", min=2, help="Tokens of a drawn window.")]
TargetContext = Annotated[
    str, typer.Option("--target-context", help="Contexts in tokens that the result is for, joined by commas.")
]
Stats = Annotated[
    Path | None,
    typer.Option(
        "--stats",
        dir_okay=False,
        help="File of saved statistics: used where it exists, written where not.",
        show_default=False,
    ),
]
Sequential = Annotated[
    bool, typer.Option("--sequential", help="closed-form: refit o_proj layer after layer on the converted model.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of whatever is random.")]
DType = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, float16 or bfloat16; as stored where not given.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_note_debug)]


def calibration_of(
    src: str,
    file: Path | None,
    field: str,
    tokens: int,
    context: int,
    target_context: str,
    stats: Path | None,
    sequential: bool,
    seed: int,
) -> Calibration | None:
    """What the options above say; none where there is neither text nor statistics."""
    if file is None and stats is None:
        return None
    from mqadapt_rs import ArgumentError, load_calibration

    try:
        contexts = [int(part) for part in target_context.split(",")]
    except ValueError as error:
        raise ArgumentError(f"--target-context '{target_context}' is not numbers joined by commas") from error
    return load_calibration(
        src,
        file,
        field=field,
        tokens=tokens,
        context=context,
        seed=seed,
        target_context=contexts,
        stats=stats,
        sequential=sequential,
    )
