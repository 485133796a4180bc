"""The entry point of `mqadapt`. Exit codes: 0 success, 1 failure, 2 usage error, 130 interrupted, 141 output closed early.

All text that it prints for people passes `mqadapt_rs.readable`: errors and warnings here, results in `output`.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings

from mqadapt_rs.errors import ArgumentError, MqadaptError
from mqadapt_rs.readable import for_terminal, readable

# the libraries read these variables when they are imported
_BARS = ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")


def main() -> None:
    """The console script."""
    if not sys.stderr.isatty():
        for switch in _BARS:
            os.environ.setdefault(switch, "1")
    warnings.formatwarning = _in_a_line
    _take_any_text(sys.stdout)
    from mqadapt_rs.cli.app import app
    from mqadapt_rs.cli.options import debug_wanted

    try:
        try:
            app(prog_name="mqadapt")
        except SystemExit as end:
            if isinstance(end.__context__, BrokenPipeError):  # Typer turns it into a silent failure
                raise end.__context__ from None
            if not end.code:
                sys.stdout.flush()  # inside this try, so that a closed output is noticed
            raise
    except BrokenPipeError:
        # a program whose reader ended (`| head`) has not failed; the unflushed rest is discarded
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)
    except Exception as error:  # noqa: BLE001 - the outermost handler
        if debug_wanted():
            print(for_terminal("".join(traceback.format_exception(error))), end="", file=sys.stderr)
        else:
            print(f"mqadapt: {readable(_in_words(error))}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ArgumentError) else 1)


def _in_a_line(message: Warning | str, category: type[Warning], *_: object, **__: object) -> str:
    """Format a warning without its source location."""
    text = str(message) if category is UserWarning else f"{category.__name__}: {message}"
    return f"mqadapt: {readable(text)}\n"


def _take_any_text(stream: object) -> None:
    """Pass file names that are not UTF-8 through unchanged, and escape characters that the encoding cannot represent."""
    if isinstance(stream, io.TextIOWrapper):
        is_unicode = stream.encoding.lower().replace("-", "").startswith("utf8")
        stream.reconfigure(errors="surrogateescape" if is_unicode else "backslashreplace")


def _in_words(error: Exception) -> str:
    """The message of an error, in one paragraph."""
    if isinstance(error, (MqadaptError, OSError)):
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.filename is not None and str(error.filename) not in text:
            text = f"{error.filename}: {text}"
        return text
    if isinstance(error, ImportError) and error.name:
        return f"{error.name} is not installed: pip install 'mqadapt-rs[eval]'"
    if isinstance(error, MemoryError):
        return "out of memory"
    return f"unexpected {type(error).__name__}: {error} (--debug shows where; please report it)"
