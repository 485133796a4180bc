"""`sensitivity`: reduce each layer alone, to every choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mqadapt_rs.search.core.options import Options
    from mqadapt_rs.search.core.space import Layers
    from mqadapt_rs.search.core.study import Study


def plans(study: Study) -> list[Layers]:
    """All plans that change one layer."""
    space = study.space
    return [
        space.single(layer, choice) for layer in range(space.num_hidden_layers) for choice in space.choices(layer)[:-1]
    ]


def run(study: Study, _options: Options) -> None:
    """Evaluate the plans."""
    singles = plans(study)
    study.expect(len(singles))
    study.evaluate(singles, "sensitivity")
