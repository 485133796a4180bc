"""The calibration options of the commands: derived from `CalibrationOptions`, passed to a command as one argument."""

from __future__ import annotations

import functools
import inspect
import warnings
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


_CONTEXT = inspect.Parameter("command_line", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)


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
        context: typer.Context = arguments.pop(_CONTEXT.name)
        values = {name: arguments.pop(name) for name in _PARAMETERS}
        calibration = _options(values)
        if isinstance(arguments.get("plan"), str):
            calibration = _with_plan_file(arguments, calibration, _given(context))
        command(**arguments, calibration=calibration)

    parameters: list[inspect.Parameter] = [_CONTEXT]
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        keyword = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        parameters.extend(_PARAMETERS.values() if parameter.name == "calibration" else [keyword])
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _given(context: typer.Context) -> set[str]:
    """The names of the options that the command line has."""
    sources = ((name, context.get_parameter_source(name)) for name in context.params)
    return {name for name, source in sources if source is not None and source.name == "COMMANDLINE"}


def _with_plan_file(arguments: dict[str, Any], options: CalibrationOptions, given: set[str]) -> CalibrationOptions:
    """Take from a plan file what the command line does not say; an option that overrides the file says so.

    Sets method and seed of `arguments`. Without calibration options the result is empty, and the plan's calibration is loaded
    with the model.
    """
    from mqadapt_rs import plan_settings

    settings = plan_settings.read(arguments["plan"])
    for name in ("method", "seed"):  # the extension warns where these override the file
        if name not in given:
            arguments[name] = settings.get(name, arguments[name])
    explicit = {name: value for name, value in options.keywords().items() if name in given}
    if not settings or not explicit:
        return options
    merged = plan_settings.overridden(settings, explicit, arguments["method"])
    for name, value in explicit.items():
        if name in settings and value != _comparable(settings[name]):
            option = name.replace("_", "-")
            warnings.warn(f"--{option} overrides the {option} of the plan file, {settings[name]}", stacklevel=2)
    return CalibrationOptions.from_keywords({name: _comparable(value) for name, value in merged.items()})


def _comparable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def load_model(src: str, calibration: CalibrationOptions, *, seed: int, **options: Any) -> Model:
    """Load a model with a progress bar; `options` as in `Model.load`."""
    from mqadapt_rs import Model
    from mqadapt_rs.cli import output

    loaded = calibration.load(src, seed)
    with output.progress_bars("bytes") as progress:
        return Model.load(src, seed=seed, calibration=loaded, progress=progress, **options)
