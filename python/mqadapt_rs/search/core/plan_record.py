"""Plans and spaces in the files of a search, in their documented fields: K/V heads of every layer.

In: plans, options and spaces. Out: what journal, summary and latency file hold, and back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mqadapt_rs._core import LayerCache
from mqadapt_rs.search.core.space import Layers, Space

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from mqadapt_rs.search.core.options import Options

    LayerSeconds = tuple[Mapping[LayerCache, float], ...]


def count(choice: LayerCache) -> int:
    """The K/V heads of a choice, by which stages, files and figures call it."""
    return choice.num_key_value_heads


def counts(plan: Iterable[LayerCache]) -> list[int]:
    """The field `num_key_value_heads` of a plan."""
    return [choice.num_key_value_heads for choice in plan]


def layers(heads: Iterable[Any]) -> Layers:
    """The plan of a field `num_key_value_heads`.

    Raises:
        TypeError, ValueError, ArithmeticError: a count is not a whole number of at least 1.
    """
    return tuple(LayerCache(int(one)) for one in heads)


def space(
    source: Sequence[int],
    head_bytes: Sequence[int],
    allowed: Iterable[int] | None = None,
    seconds: LayerSeconds | None = None,
) -> Space:
    """The space of a model with these K/V heads in its layers, a head of each layer taking these bytes per token.

    Raises:
        TypeError, ValueError: the fields cannot be those of a model.
    """
    own = layers(source)
    reductions = {choice: choice.reductions() for choice in set(own)}
    table = tuple(
        {one: count(one) * size for one in reductions[choice]} for choice, size in zip(own, head_bytes, strict=True)
    )
    return Space(own, table, None if allowed is None else layers(allowed), seconds)


def space_fields(space: Space) -> dict[str, Any]:
    """The fields `source`, `head_bytes` and `layer_seconds` of a journal."""
    own = zip(space.source, space.layer_bytes, strict=True)
    return {
        "source": counts(space.source),
        "head_bytes": [table[choice] // count(choice) for choice, table in own],
        "layer_seconds": None if space.layer_seconds is None else seconds_field(space.layer_seconds),
    }


def seconds_field(seconds: LayerSeconds) -> list[list[list[float]]]:
    """The field `layer_seconds`: for each layer, pairs of K/V heads and seconds."""
    return [[[count(choice), time] for choice, time in table.items()] for table in seconds]


def read_seconds(field: Any) -> LayerSeconds:
    """The times of a field `layer_seconds`.

    Raises:
        TypeError, ValueError, ArithmeticError: the field does not have its form.
    """
    return tuple({LayerCache(int(heads)): float(time) for heads, time in table} for table in field)


def option_fields(options: Options) -> dict[str, Any]:
    """The field `options` of a journal: the options that were given."""
    fields = {key: value for key, value in vars(options).items() if value is not None}
    if options.plans is not None:
        fields["plans"] = [counts(plan) for plan in options.plans]
    return fields
