"""`alternate`: reduce every second layer from the end, 2, 3, ... layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mqadapt_rs.search.core.plan_record import count

if TYPE_CHECKING:
    from mqadapt_rs.search.core.options import Options
    from mqadapt_rs.search.core.study import Study


def run(study: Study, _options: Options) -> None:
    """Evaluate the patterns."""
    space = study.space
    choices = space.targets()
    most = (space.num_hidden_layers + 1) // 2
    numbers = range(min(2, most), most + 1)
    study.expect(len(choices) * len(numbers))
    for choice in choices:
        study.evaluate([space.alternate(number, choice) for number in numbers], f"alternate layers to {count(choice)}")
