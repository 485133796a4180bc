"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

_debug_wanted: list[bool] = []


def _note_debug(value: bool) -> bool:
    _debug_wanted.append(value)
    return value


def debug_wanted() -> bool:
    """Whether `--debug` was given."""
    return any(_debug_wanted)


Src = Annotated[str, typer.Argument(help="A folder, a .gguf file or a hub id org/name[@revision].", show_default=False)]
PlanText = Annotated[
    str,
    typer.Option(
        "--plan",
        help="K/V heads of each layer: 'keep', 'mqa:last8', 'gqa2:0,3-7; mqa:alternate4', '1, 0, ...', or a plan file "
        "(.json, .yaml).",
    ),
]
Method = Annotated[str, typer.Option("--method", help="How K/V heads are merged: mean, first or random.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of whatever is random.")]
DType = Annotated[
    str | None,
    typer.Option("--dtype", help="float32, float16 or bfloat16; as stored where not given.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_note_debug)]
