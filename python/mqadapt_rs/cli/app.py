"""The commands of `mqadapt`, one file each, and the options of the program itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mqadapt_rs.cli.bench import bench
from mqadapt_rs.cli.convert import convert
from mqadapt_rs.cli.demo import demo
from mqadapt_rs.cli.evaluate import evaluate, lm_eval
from mqadapt_rs.cli.generate import generate
from mqadapt_rs.cli.inspect import inspect
from mqadapt_rs.cli.options import Debug
from mqadapt_rs.cli.perplexity import perplexity
from mqadapt_rs.cli.search import plot, report, search
from mqadapt_rs.cli.verify import verify
from mqadapt_rs.readable import readable

# the base class of usage errors, in click or in its replacement inside Typer
UsageError: Any = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """The group of commands. Usage errors are printed without control characters."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """As in the base class."""
        with _readable_usage_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """As in the base class."""
        with _readable_usage_errors():
            return super().invoke(ctx)


@contextmanager
def _readable_usage_errors() -> Iterator[None]:
    try:
        yield
    except UsageError as error:
        error.message = readable(error.message)
        raise


app = typer.Typer(
    cls=Commands,
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
    """Shrink the K/V cache of a pretrained transformer layer by layer, and measure what that costs."""


app.command()(inspect)
app.command()(convert)
app.command()(verify)
app.command("eval")(evaluate)
app.command(
    "lm-eval",
    add_help_option=False,  # lm-eval has its own
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(lm_eval)
app.command()(perplexity)
app.command()(generate)
app.command()(bench)
app.command()(demo)
app.command()(search)
app.command()(plot)
app.command()(report)
