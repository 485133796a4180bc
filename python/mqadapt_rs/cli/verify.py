"""`mqadapt verify`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mqadapt_rs.cli.options import Debug, Family, Json


def verify(
    dst: Annotated[Path, typer.Argument(help="A converted checkpoint.", show_default=False)],
    against: Annotated[
        str | None, typer.Option("--against", help="The source model of the conversion.", show_default=False)
    ] = None,
    family: Family = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Verify a converted checkpoint against its manifest and, with --against, against its source model.

    The exit code is 1 if the command finds a problem.
    """
    import mqadapt_rs
    from mqadapt_rs.cli import output

    with output.progress_bars("bytes") as progress:
        found = mqadapt_rs.verify(dst, against, progress=progress)
    counts = {
        "shards": found.shards,
        "tensors": found.tensors,
        "bytes": found.bytes,
        "compared": found.compared,
        "not_compared": found.not_compared,
    }
    if json:
        output.print_json({"ok": found.ok, "problems": found.problems, **counts})
    else:
        compared = f", {found.compared} compared with {against}" if against else ""
        skipped = f", {found.not_compared} not compared (their method needs its text)" if found.not_compared else ""
        size = output.in_bytes(found.bytes)
        rows = {"checked": f"{found.tensors} tensors in {found.shards} files, {size}{compared}{skipped}"}
        rows |= {f"problem {number}": problem for number, problem in enumerate(found.problems, 1)}
        output.print_table(str(dst), {**rows, "result": "ok" if found.ok else "FAILED"})
    raise typer.Exit(0 if found.ok else 1)
