"""The commands of `mqadapt`, one file each, and what stands before a command."""

from __future__ import annotations

from typing import Annotated

import typer

from mqadapt_rs.cli.options import Debug

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from mqadapt_rs import __version__

        typer.echo(f"mqadapt {__version__}")
        raise typer.Exit


@app.callback()
def mqadapt(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Give every layer of a pretrained transformer its own number of K/V heads, and see what that costs."""
