"""What the commands that merge from text have in common: the options about it, in one argument."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from mqadapt_rs import Calibration, Model


def _options(
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Text for closed-form and prune: a plain file, .jsonl\\[.gz], or a data set of the hub, "
            "org/name\\[@revision]\\[:folder or file].",
            show_default=False,
        ),
    ] = None,
    calibration_field: Annotated[
        str, typer.Option("--calibration-field", help="The field of a record that holds the text.")
    ] = "text",
    calibration_tokens: Annotated[
        int, typer.Option("--calibration-tokens", min=1, help="Tokens drawn from the text.")
    ] = 16384,
    calibration_context: Annotated[
        str,
        typer.Option(
            "--calibration-context",
            help="Tokens of a drawn window, one length or several joined by commas, each of which gets an equal part of the "
            "tokens.",
        ),
    ] = "512,2048",
    target_context: Annotated[
        str | None,
        typer.Option(
            "--target-context",
            help="Contexts in tokens that the result is for, joined by commas: 512,2048 by default, as far as the windows "
            "are that long.",
            show_default=False,
        ),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            "--stats",
            dir_okay=False,
            help="File of saved statistics: used where it exists, written where not.",
            show_default=False,
        ),
    ] = None,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="closed-form: refit o_proj layer after layer on the converted model.")
    ] = False,
    refine: Annotated[
        int, typer.Option(min=0, help="closed-form: gradient steps on every merged layer before that; 96 are good.")
    ] = 0,
) -> None:
    """Never called: its parameters are those options."""


_PARAMETERS = {
    name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
    for name, parameter in inspect.signature(_options, eval_str=True).parameters.items()
}


@dataclass(frozen=True)
class Calibrated:
    """What was said in these options."""

    values: dict[str, Any]

    @property
    def context(self) -> list[int]:
        """The lengths of the windows that are drawn.

        Raises:
            ArgumentError: they are not numbers, or there is one below 2.
        """
        return _lengths("--calibration-context", self.values["calibration_context"], least=2)

    @property
    def target_context(self) -> list[int] | None:
        """The contexts that the result is for; none where they follow from the windows.

        Raises:
            ArgumentError: they are not numbers.
        """
        text = self.values["target_context"]
        return None if text is None else _lengths("--target-context", text, least=1)

    def load(self, src: str, seed: int) -> Calibration | None:
        """The text or the statistics for a model; none where neither was given.

        Raises:
            ArgumentError: an option that needs them was given alone.
            OSError, MqadaptError: as `load_calibration`.
        """
        given = self.values
        if given["calibration"] is None and given["stats"] is None:
            if given["sequential"] or given["refine"]:
                from mqadapt_rs import ArgumentError

                raise ArgumentError("--sequential and --refine need --method closed-form and a --calibration")
            return None
        from mqadapt_rs import load_calibration

        return load_calibration(
            src,
            given["calibration"],
            field=given["calibration_field"],
            tokens=given["calibration_tokens"],
            context=self.context,
            seed=seed,
            target_context=self.target_context,
            stats=given["stats"],
            sequential=given["sequential"],
            refine=given["refine"],
        )

    def model(self, src: str, *, seed: int, **options: Any) -> Model:
        """The model, as `Model.load` takes the options; shows how far it is."""
        from mqadapt_rs import Model
        from mqadapt_rs.cli import output

        calibration = self.load(src, seed)
        with output.progress_bars("bytes" if calibration is None else "layers or bytes") as progress:
            return Model.load(src, seed=seed, calibration=calibration, progress=progress, **options)


def _lengths(option: str, text: str, least: int) -> list[int]:
    from mqadapt_rs import ArgumentError

    try:
        lengths = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ArgumentError(f"{option} '{text}' is not numbers joined by commas") from error
    if min(lengths) < least:
        raise ArgumentError(f"{option} {text}: a length is at least {least}, found {min(lengths)}")
    return lengths


def calibrated(command: Callable[..., None]) -> Callable[..., None]:
    """Puts the options where a command has the parameter `calibration: Calibrated`."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        chosen = {name: arguments.pop(name) for name in _PARAMETERS}
        command(**arguments, calibration=Calibrated(chosen))

    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        keyword = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        parameters.extend(_PARAMETERS.values() if parameter.name == "calibration" else [keyword])
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
