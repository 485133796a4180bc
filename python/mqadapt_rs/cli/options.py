"""Options that several commands share, and the parsers of their values."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from mqadapt_rs._core import methods, register_family

_debug_wanted: list[bool] = []


def _note_debug(value: bool) -> bool:
    _debug_wanted.append(value)
    return value


def debug_wanted() -> bool:
    """Whether `--debug` was given."""
    return any(_debug_wanted)


def _insist(family: str | None) -> str | None:
    if family is not None:
        register_family(None, family)
    return family


_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def byte_count(text: str) -> int:
    """The number of bytes of a size such as `5GB`, `64MiB` or `1000`."""
    match = re.fullmatch(r"(\d+)\s*([KMGT]?I?)B?", str(text).strip().upper())
    if match is None or match[2] not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a size such as 5GB, 64MiB or 1000")
    return int(match[1]) * _UNITS[match[2]]


def _methods(calibrated: bool, joint: str) -> str:
    """The names of the methods that do or do not need a calibration."""
    return joint.join(method.name for method in methods() if method.needs_calibration == calibrated)


Src = Annotated[
    str, typer.Argument(help="A folder, a .gguf file or a hub id org/name\\[@revision].", show_default=False)
]
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
        help=f"How K/V heads are merged: {_methods(False, ', ')}; {_methods(True, ' and ')} need --calibration or --stats.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the random number generator.")]
DType = Annotated[
    str | None,
    typer.Option(
        "--dtype", help="Dtype of the weights: float32, float16 or bfloat16; by default as stored.", show_default=False
    ),
]
Weights = Annotated[
    str,
    typer.Option(
        "--weights",
        help="Format of the weights: stored, or int8 (half the memory, faster, slightly less accurate; cpu only).",
    ),
]
Kv = Annotated[
    str | None,
    typer.Option(
        "--kv",
        help="How the K/V cache of all layers is stored: computed, int8 or int4 (half and a quarter of the bytes of bfloat16; "
        "cpu only); by default as the plan says.",
        show_default=False,
    ),
]
Family = Annotated[
    str | None,
    typer.Option(
        "--family",
        help="Read a model whose model_type is not known as one of this family, for instance llama.",
        show_default=False,
        callback=_insist,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Print the traceback of an error.", callback=_note_debug)]
