"""`given`: the plans that one names, measured side by side. What do these cost, on these documents?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mqadapt_rs.errors import ArgumentError

if TYPE_CHECKING:
    from mqadapt_rs.search.core.space import Layers, Space
    from mqadapt_rs.search.core.study import Options, Study


def named(space: Space, options: Options) -> list[Layers]:
    """The plans, each once, but for the source."""
    return [plan for plan in dict.fromkeys(options.plans or ()) if plan != space.source]


def refuse(space: Space, options: Options) -> None:
    """Refuses to measure nothing.

    Raises:
        ArgumentError: so.
    """
    if not named(space, options):
        raise ArgumentError("the strategy 'given' needs --plan, once or more, other than 'keep'")


def run(study: Study, options: Options) -> None:
    """Evaluates them in full."""
    plans = named(study.space, options)
    study.expect(len(plans))
    study.evaluate(plans, "given")
