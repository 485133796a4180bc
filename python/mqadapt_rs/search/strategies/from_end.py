"""`from-end`: reduce the last 2, 4, 8, 16 ... layers; with a limit of the damage, bisect to the most layers within it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mqadapt_rs.search.core.plan_record import count

if TYPE_CHECKING:
    from mqadapt_rs.search.core.options import Options
    from mqadapt_rs.search.core.study import Study


def numbers(num_hidden_layers: int) -> list[int]:
    """2, 4, 8, ... and all layers."""
    doubled = [2**power for power in range(1, num_hidden_layers.bit_length()) if 2**power < num_hidden_layers]
    return [*doubled, num_hidden_layers]


def run(study: Study, options: Options) -> None:
    """Evaluate the doubling suffixes, then bisect between the last one within the limit and the first one beyond it.

    Bisection assumes that the damage grows with the number of layers; the evaluated plans show whether it does.
    """
    space = study.space
    choices = space.targets()
    steps = numbers(space.num_hidden_layers)
    study.expect(len(choices) * len(steps))
    for choice in choices:
        found = study.evaluate([space.last(number, choice) for number in steps], f"last layers to {count(choice)}")
        if options.max_damage is None:
            continue
        good, bad = 0, space.num_hidden_layers + 1
        for number, evaluation in zip(steps, found, strict=True):
            if evaluation.damage.mean > options.max_damage:
                bad = number
                break
            good = number
        while bad - good > 1:
            middle = (good + bad) // 2
            (evaluation,) = study.evaluate([space.last(middle, choice)], f"bisection to {count(choice)}")
            if evaluation.damage.mean > options.max_damage:
                bad = middle
            else:
                good = middle
