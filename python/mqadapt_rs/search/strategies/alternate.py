"""`alternate`: every second layer from the end, 2, 3, ... of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mqadapt_rs.search.core.study import Options, Study


def run(study: Study, options: Options) -> None:
    """Evaluates them."""
    space = study.space
    counts = options.counts or (space.reduced()[0],)
    most = (space.num_hidden_layers + 1) // 2
    numbers = range(min(2, most), most + 1)
    study.expect(len(counts) * len(numbers))
    for count in counts:
        study.evaluate([space.alternate(number, count) for number in numbers], f"alternate layers to {count}")
