"""`mqadapt convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mqadapt_rs.calibration import CalibrationOptions
from mqadapt_rs.cli.calibration import with_calibration
from mqadapt_rs.cli.options import Debug, DType, Family, Json, Method, PlanText, Seed, Src, byte_count


@with_calibration
def convert(
    src: Src,
    dst: Annotated[Path, typer.Argument(help="The output folder; the command creates it.", show_default=False)],
    plan: PlanText = "keep",
    method: Method = "mean",
    seed: Seed = 0,
    dtype: DType = None,
    *,
    calibration: CalibrationOptions,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DST if it is a converted checkpoint.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume an interrupted conversion; keep the finished work if this one fails."),
    ] = False,
    stream_download: Annotated[
        bool,
        typer.Option(
            "--stream-download",
            help="Download the weight files of a hub model one at a time and delete each after it is converted.",
        ),
    ] = False,
    max_shard_size: Annotated[
        int | None,
        typer.Option(
            "--max-shard-size",
            parser=byte_count,
            metavar="SIZE",
            help="Largest output file, for instance 5GB.",
            show_default="as SRC",
        ),
    ] = None,
    max_memory: Annotated[
        int, typer.Option("--max-memory", parser=byte_count, metavar="SIZE", help="Total size of the buffers.")
    ] = byte_count("64MiB"),
    sync: Annotated[
        bool,
        typer.Option(
            "--sync/--no-sync", help="Flush the output to disk before the command ends (safe against power loss)."
        ),
    ] = True,
    family: Family = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Convert a model: write a checkpoint whose layers have the K/V heads that the plan gives them."""
    import mqadapt_rs
    from mqadapt_rs.cli import output

    text_or_stats = calibration.load(src, seed)
    with output.progress_bars("bytes") as progress:
        report = mqadapt_rs.convert(
            src,
            dst,
            plan,
            method,
            seed=seed,
            dtype=dtype,
            overwrite=overwrite,
            calibration=text_or_stats,
            resume=resume,
            max_shard_size=max_shard_size,
            max_memory=max_memory,
            sync=sync,
            stream_download=stream_download,
            progress=progress,
        )
    if json:
        output.print_json(report.to_dict())
        return
    output.print_table(str(dst), _summary(report.to_dict()))


def _summary(report: dict[str, Any]) -> dict[str, object]:
    """The rows of the printed table; `mqadapt.json` holds all figures."""
    from mqadapt_rs.cli import output

    before, after = report["kv_bytes_per_token_before"], report["kv_bytes_per_token_after"]
    fallbacks = _fallbacks(report)
    return {
        "K/V heads (layers: heads)": output.in_runs(report["num_key_value_heads_after"]),
        "K/V cache per token": f"{output.in_bytes(after)} (before: {output.in_bytes(before)}, {1 - after / before:.0%} saved)",
        "parameters": f"{report['parameters_after']:,} (before: {report['parameters_before']:,})",
        "merged layers": _merged(report),
        **({"fallbacks": fallbacks} if fallbacks else {}),
        "written": f"{output.in_bytes(report['bytes_written'])} in {report['seconds']:.1f} s, {report['dtype']}",
    }


def _merged(report: dict[str, Any]) -> str:
    """How many layers were merged and how well, or why none was."""
    before, after = report["num_key_value_heads_before"], report["num_key_value_heads_after"]
    layers = zip(report["relative_error"], before, after, strict=True)
    errors = [error for error, old, new in layers if error or old != new]
    if errors:
        return f"{len(errors)}, relative error {min(errors):.3f} to {max(errors):.3f}"
    if set(before) == {1}:
        return "nothing to merge: every layer has 1 K/V head"
    return "none: every layer keeps its K/V heads"


def _fallbacks(report: dict[str, Any]) -> str:
    """The fallbacks that a method took, one line each, with their layers."""
    layers: dict[str, list[str]] = {}
    for layer_idx, notes in report.get("layers", {}).items():
        for fallback in notes.get("fallbacks", ()):
            layers.setdefault(fallback, []).append(layer_idx)
    return "\n".join(f"layers {', '.join(of)}: {fallback}" for fallback, of in layers.items())
