"""`given`: evaluate the given plans side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mqadapt_rs.errors import ArgumentError

if TYPE_CHECKING:
    from mqadapt_rs.search.core.options import Options
    from mqadapt_rs.search.core.space import Layers, Space
    from mqadapt_rs.search.core.study import Study


def named(space: Space, options: Options) -> list[Layers]:
    """The given plans without repetition and without the source."""
    return [plan for plan in dict.fromkeys(options.plans or ()) if plan != space.source]


def refuse(space: Space, options: Options) -> None:
    """Validate the options.

    Raises:
        ArgumentError: no plan is given except the source.
    """
    if not named(space, options):
        raise ArgumentError("the strategy 'given' needs --plan, once or more, other than 'keep'")


def run(study: Study, options: Options) -> None:
    """Evaluate the plans completely."""
    plans = named(study.space, options)
    study.expect(len(plans))
    study.evaluate(plans, "given")
