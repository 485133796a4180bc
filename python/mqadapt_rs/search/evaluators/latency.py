"""Time of a decoded token, layer by layer and count by count, measured on this machine.

In: a model. Out: seconds that a layer takes with each number of K/V heads. Layers with the same K/V heads in the source
are changed together, and the time is shared among them; what does not depend on the plan is shared by all. Which weights a
merged head gets changes no time.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from mqadapt_rs import files
from mqadapt_rs.search.core.journal import JournalError, write_json
from mqadapt_rs.search.core.space import Space

if TYPE_CHECKING:
    from pathlib import Path

    from mqadapt_rs import Model

FILE = "latency.json"
TOKENS = 24
"""Tokens whose times are measured in each of the rounds."""
ROUNDS = 3

LayerSeconds = tuple[tuple[tuple[int, float], ...], ...]


def decode_seconds(model: Model, depth: int) -> float:
    """Median time of a decoded token after `depth` tokens, in seconds; the best of a few rounds."""
    return min(statistics.median(model.measure_decode(depth, TOKENS)) for _ in range(ROUNDS))


def measure(model: Model, space: Space, depth: int) -> LayerSeconds:
    """Seconds of each layer with each of its counts, at a depth of `depth` tokens."""
    source = decode_seconds(model, depth)
    shared = source / space.num_hidden_layers
    difference: dict[tuple[int, int], float] = {}
    for own in sorted(set(space.source)):
        alike = [layer for layer, heads in enumerate(space.source) if heads == own]
        for count in space.choices(alike[0])[:-1]:
            planned = decode_seconds(model.with_plan(list(space.with_layers(alike, count)), "first"), depth)
            difference[own, count] = (planned - source) / len(alike)
    return tuple(
        tuple((count, shared + difference.get((own, count), 0.0)) for count in space.choices(layer))
        for layer, own in enumerate(space.source)
    )


def measured(folder: Path, model: Model, space: Space, depth: int, *, resume: bool) -> Space:
    """The space with measured times; a search that is resumed keeps those that it began with."""
    path = folder / FILE
    if resume and path.exists():
        try:
            content = files.read_json(path)
            seconds = tuple(tuple((int(c), float(s)) for c, s in layer) for layer in content["layer_seconds"])
            if len(seconds) != space.num_hidden_layers or not all(0 <= s < 1e9 for layer in seconds for _, s in layer):
                raise ValueError("expected times of every layer, in seconds")
        except (LookupError, TypeError, ValueError, ArithmeticError) as problem:
            raise JournalError(
                f"{path}: not the times that a search measured ({problem!r}); remove it to measure them again"
            ) from None
    else:
        seconds = measure(model, space, depth)
    return Space(space.source, space.head_bytes, space.counts, seconds)


def save(folder: Path, space: Space, depth: int) -> None:
    """Writes the times of a space for a search that is resumed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE, {"depth": depth, "layer_seconds": space.layer_seconds})
