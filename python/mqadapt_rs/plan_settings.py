"""How a plan file merges heads: its method, calibration text and options.

In: a plan file, and what a caller says beside it. Out: settings by the names of the keyword arguments, and their calibration.
A path in a plan file is relative to the folder of the file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mqadapt_rs._core import Calibration, methods, plan_merge_settings
from mqadapt_rs.calibration import CalibrationOptions, load_windows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mqadapt_rs import Plan
    from mqadapt_rs.sources.hub import Source

_PATHS = ("calibration", "stats")
_OF_METHODS = ("sequential", "refine", "fast_pairs", "regroup")


def read(plan: Plan | str | os.PathLike[str] | Sequence[int] | None) -> dict[str, Any]:
    """Read `method` and options of a plan file, its paths relative to the current folder; empty for other plans.

    Raises:
        MqadaptError, OSError: the file cannot be read.
    """
    settings = plan_merge_settings(plan)
    for name in _PATHS:
        if name in settings:
            beside = Path(str(plan).strip()).parent / settings[name]
            # what is not there is a data set of the hub, or a file that the error names as the plan file does
            settings[name] = str(beside) if name == "stats" or beside.exists() else settings[name]
    return settings


def fields(method: str, seed: int, calibration: CalibrationOptions | None, folder: Path) -> dict[str, Any]:
    """The fields `method` and `options` of a plan file in a folder."""
    options: dict[str, Any] = {"seed": seed}
    if calibration is not None and _needs_calibration(method):
        given = calibration.keywords()
        options |= {name: value for name, value in given.items() if value is not None and fits(name, method)}
        for name in _PATHS:
            if name in options and Path(options[name]).exists():
                options[name] = os.path.relpath(options[name], folder)
    return {"method": method, "options": options}


def fits(option: str, method: str) -> bool:
    """Whether an option is one of the calibration of a method."""
    return option not in _OF_METHODS or any(option in one.options for one in methods() if one.name == method)


def _needs_calibration(method: str) -> bool:
    return any(one.needs_calibration for one in methods() if one.name == method)


def overridden(settings: Mapping[str, Any], given: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The calibration of a plan file under what a caller gives: keyword arguments of `CalibrationOptions`.

    Statistics belong to a text. So another text drops the statistics of the file, and statistics that exist drop its text.
    """
    known = CalibrationOptions().keywords()
    own = {name: value for name, value in settings.items() if name in known and fits(name, method)}
    if "stats" in given and Path(given["stats"]).exists():
        own.pop("calibration", None)
    if any(
        name in given and given[name] != own.get(name)
        for name in ("calibration", "calibration_field", "calibration_tokens", "calibration_context")
    ):
        own.pop("stats", None)
    return {**own, **given}


def load_calibration_of(src: Source, plan: str | os.PathLike[str], method: str, seed: int) -> Calibration:
    """Load the calibration that a plan file names for a method.

    Raises:
        OSError, MqadaptError: as `load_calibration`.
    """
    settings = {name: value for name, value in read(plan).items() if fits(name, method)}
    if settings.get("seed", seed) != seed and "calibration" in settings:
        settings.pop("stats", None)  # another seed draws other windows
    named = {name: value for name, value in settings.items() if name in CalibrationOptions().keywords()}
    options = CalibrationOptions.from_keywords(named)
    text = options.text
    if options.stats is not None and Path(options.stats).exists() and not options.refits:
        text = None  # the statistics are all that is read of it
    windows = None
    if text is not None:
        windows = load_windows(
            src, text, field=options.field, tokens=options.tokens, context=options.context, seed=seed
        )
    return Calibration(
        windows,
        target_context=options.target_context,
        stats=options.stats,
        sequential=options.sequential,
        refine=options.refine,
        fast_pairs=settings.get("fast_pairs"),
        regroup=settings.get("regroup", True),
    )
