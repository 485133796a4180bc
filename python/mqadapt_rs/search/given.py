"""`given`: the plans that one names, measured side by side. What do these cost, on these documents?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mqadapt_rs.errors import ArgumentError

if TYPE_CHECKING:
    from .study import Options, Study


def run(study: Study, options: Options) -> None:
    """Evaluates them in full."""
    plans = [plan for plan in dict.fromkeys(options.plans or ()) if plan != study.space.source]
    if not plans:
        raise ArgumentError("the strategy 'given' needs --plan, once or more, other than 'keep'")
    study.expect(len(plans))
    study.evaluate(plans, "given")
