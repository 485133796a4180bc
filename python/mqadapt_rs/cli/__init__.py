"""The command line: `mqadapt`. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 141 nobody read the output."""

from __future__ import annotations

import os
import sys
import warnings

from mqadapt_rs.errors import ArgumentError, MqadaptError

# progress bars of the libraries that we call, which heed these when they are imported
_BARS = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")


def main() -> None:
    """The console script."""
    if not sys.stderr.isatty():
        for switch in _BARS:
            os.environ.setdefault(switch, "1")
    warnings.formatwarning = _in_a_line
    from mqadapt_rs.cli.app import app
    from mqadapt_rs.cli.options import debug_wanted

    try:
        try:
            app(prog_name="mqadapt")
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # which Typer turns into a failure without a word
                raise end.__context__ from None
            if not end.code:
                sys.stdout.flush()  # here, where it can be said that nobody reads it
            raise
    except BrokenPipeError:
        # as programs end whose reader went away (`| head`): no failure of theirs. What is left to flush goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except Exception as error:
        if debug_wanted():
            raise
        sys.exit(_report(error))


def _in_a_line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    """A warning without its place in the code, which says nothing to a user."""
    return f"mqadapt: {message}\n" if category is UserWarning else f"mqadapt: {category.__name__}: {message}\n"


def _report(error: Exception) -> int:
    """Says what went wrong in one paragraph. The exit code."""
    if isinstance(error, (MqadaptError, OSError)):
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.filename is not None and str(error.filename) not in text:
            text = f"{error.filename}: {text}"
    elif isinstance(error, ImportError) and error.name:
        text = f"{error.name} is not installed: pip install 'mqadapt-rs[eval]'"
    elif isinstance(error, MemoryError):
        text = "out of memory"
    else:
        text = f"unexpected {type(error).__name__}: {error} (--debug shows where; please report it)"
    print(f"mqadapt: {text}", file=sys.stderr)
    return 2 if isinstance(error, ArgumentError) else 1
