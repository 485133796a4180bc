"""Latency of a decoded token, layer by layer and choice by choice, measured on this machine.

In: a model. Out: the seconds that a layer takes with each choice. Layers that cache the same in the source are changed
together and share the measured time; all layers share the time that does not depend on the plan. The values of merged weights
do not change the time.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING

from mqadapt_rs import files
from mqadapt_rs.search.core import plan_record
from mqadapt_rs.search.core.journal import JournalError, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from mqadapt_rs import Model
    from mqadapt_rs._core import LayerCache
    from mqadapt_rs.search.core.plan_record import LayerSeconds
    from mqadapt_rs.search.core.space import Space

FILE = "latency.json"
TOKENS = 24
"""Tokens measured per round."""
ROUNDS = 3


def decode_seconds(model: Model, depth: int) -> float:
    """The median latency of a decoded token after `depth` tokens, in seconds, in the fastest round."""
    return min(statistics.median(model.measure_decode(depth, TOKENS)) for _ in range(ROUNDS))


def measure(model: Model, space: Space, depth: int) -> LayerSeconds:
    """Seconds of each layer with each of its choices, at a depth of `depth` tokens."""
    source = decode_seconds(model, depth)
    shared = source / space.num_hidden_layers
    difference: dict[tuple[LayerCache, LayerCache], float] = {}
    for own in dict.fromkeys(space.source):
        alike = [layer for layer, other in enumerate(space.source) if other == own]
        for choice in space.choices(alike[0])[:-1]:
            plan = space.plan(space.with_layers(alike, choice))
            difference[own, choice] = (decode_seconds(model.with_plan(plan, "first"), depth) - source) / len(alike)
    return tuple(
        {choice: shared + difference.get((own, choice), 0.0) for choice in space.choices(layer)}
        for layer, own in enumerate(space.source)
    )


def measured(folder: Path, model: Model, space: Space, depth: int, *, resume: bool) -> Space:
    """The space with measured times; a resumed search reads the times of its first run."""
    path = folder / FILE
    if resume and path.exists():
        try:
            content = files.read_json(path)
            seconds = plan_record.read_seconds(content["layer_seconds"])
            if len(seconds) != space.num_hidden_layers or not all(0 <= s < 1e9 for t in seconds for s in t.values()):
                raise ValueError("expected times of every layer, in seconds")
        except (LookupError, TypeError, ValueError, ArithmeticError) as problem:
            raise JournalError(
                f"{path}: not the latencies of a search ({problem!r}); remove the file to measure them again"
            ) from None
    else:
        seconds = measure(model, space, depth)
    return replace(space, layer_seconds=seconds)


def save(folder: Path, space: Space, depth: int) -> None:
    """Write the times of a space, for a resumed search."""
    folder.mkdir(parents=True, exist_ok=True)
    seconds = None if space.layer_seconds is None else plan_record.seconds_field(space.layer_seconds)
    write_json(folder / FILE, {"depth": depth, "layer_seconds": seconds})
