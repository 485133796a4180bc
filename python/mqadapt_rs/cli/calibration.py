"""The calibration options of the commands: derived from `CalibrationOptions`, passed to a command as one argument."""

from __future__ import annotations

import functools
import inspect
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mqadapt_rs.calibration import CalibrationOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from mqadapt_rs import Model


def _parameter(name: str, default: Any, metadata: dict[str, Any]) -> inspect.Parameter:
    """The parameter of a command for one option."""
    kind: Any = metadata["type"]
    about = {"help": metadata["help"], "show_default": default is not None}
    if kind is Path:
        about["dir_okay"] = False
    if kind is tuple:  # lengths, separated by commas
        kind, default = str, None if default is None else ",".join(map(str, default))
    elif "least" in metadata:
        about["min"] = metadata["least"]
    typed: Any = kind if default is not None else kind | None
    annotation: Any = Annotated[typed, typer.Option(f"--{name.replace('_', '-')}", **about)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


_OPTIONS = {option.metadata["name"]: option for option in fields(CalibrationOptions)}
_PARAMETERS = {name: _parameter(name, option.default, dict(option.metadata)) for name, option in _OPTIONS.items()}


def _options(values: dict[str, Any]) -> CalibrationOptions:
    """The options that a command line has.

    Raises:
        ArgumentError: lengths are not numbers, or one is too short.
    """
    found = dict(values)
    for name, option in _OPTIONS.items():
        if option.metadata["type"] is tuple and values[name] is not None:
            found[name] = _lengths(f"--{name.replace('_', '-')}", values[name], option.metadata["least"])
    return CalibrationOptions.from_keywords(found)


def _lengths(option: str, text: str, least: int) -> tuple[int, ...]:
    from mqadapt_rs import ArgumentError

    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ArgumentError(f"{option} '{text}': expected numbers separated by commas") from error
    if min(lengths) < least:
        raise ArgumentError(f"{option} {text}: expected lengths of at least {least}; found {min(lengths)}")
    return lengths


def with_calibration(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the calibration options, in the place of its parameter `calibration: CalibrationOptions`."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        values = {name: arguments.pop(name) for name in _PARAMETERS}
        command(**arguments, calibration=_options(values))

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        keyword = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        parameters.extend(_PARAMETERS.values() if parameter.name == "calibration" else [keyword])
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def load_model(src: str, calibration: CalibrationOptions, *, seed: int, **options: Any) -> Model:
    """Load a model with a progress bar; `options` as in `Model.load`."""
    from mqadapt_rs import Model
    from mqadapt_rs.cli import output

    loaded = calibration.load(src, seed)
    with output.progress_bars("bytes" if loaded is None else "layers or bytes") as progress:
        return Model.load(src, seed=seed, calibration=loaded, progress=progress, **options)
