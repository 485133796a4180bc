"""The report of a search: its result, the uncertainty of the result, and the commands to reproduce it.

In: the folder of a search. Out: `report.html`, self-contained, and `report.md` with the same content and front matter, which is a
model card for the checkpoint that `convert` writes from the winning plan.
"""

from __future__ import annotations

import html
import json
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from mqadapt_rs import output_files
from mqadapt_rs.plots import caption, plot
from mqadapt_rs.readable import as_code_block, as_html, as_markdown, as_shell_again, readable
from mqadapt_rs.search.core import plan_record
from mqadapt_rs.search.core.journal import BEST
from mqadapt_rs.search.results import Results

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from mqadapt_rs.search.core.evaluation import Evaluation

ROWS = 12
"""Plans in the table of the best."""
SETTINGS = ("name", "model", "weights", "text", "method", "calibration", "metric", "strategy", "options", "seed",
            "documents", "version")  # fmt: skip
"""The fields of the journal that the figures depend on."""
HEADINGS = {
    "sensitivity": "Each layer alone",
    "from-end": "From the end",
    "alternate": "Every second layer",
    "pareto": "K/V bytes against damage",
    "plan": "The plan",
    "latency": "Latency",
}


def report(folder: str | os.PathLike[str], *, latency: Path | None = None) -> tuple[Path, Path]:
    """Write `report.html` and `report.md` into the folder of a search, and the figures into its `plots`.

    Raises:
        ArgumentError: the folder holds no search.
        ImportError: matplotlib is not installed (extra `plot`).
    """
    place = Path(folder)
    result = Results.load(place)
    pictures = plot(place, latency=latency)
    page = Page(result, pictures)
    paths = place / "report.html", place / "report.md"
    output_files.write(paths[0], page.html().encode())
    output_files.write(paths[1], page.markdown().encode())
    return paths


Table = tuple[list[str], list[list[str]]]


class Page:
    """The content of a report, as HTML or as Markdown."""

    def __init__(self, result: Results, pictures: Sequence[Path]) -> None:
        self.result = result
        self.pictures = pictures
        self.title = f"{result.header.get('name', 'Model')}: {result.header['strategy']} search by {result.metric.name}"

    def verdict(self) -> str:
        """The verdict, in words."""
        if self.result.summary is None:
            return f"The search has not ended: {len(self.result.evaluations)} plans are evaluated so far."
        return str(self.result.summary["verdict"])

    def facts(self) -> Table:
        """Source and winner side by side."""
        result, winner = self.result, self.result.winner
        metric = result.metric
        rows = [
            ["K/V bytes per token", f"{result.source.kv_bytes:,}", winner and f"{winner.kv_bytes:,}"],
            ["K/V bytes, share of the source", "100 %", winner and f"{result.share(winner):.1f} %"],
            [f"{metric.name} [{metric.unit}]", value(result.source), winner and value(winner)],
            [f"damage [{metric.damage_unit}], ± standard error", "0", winner and str(winner.damage)],
            ["95 % interval of the damage", "", winner and interval(winner)],
            ["layers changed", "0", winner and str(changed(winner, result))],
        ]
        return ["", "source", "winner"], [[str(cell) for cell in row if cell is not None] for row in rows]

    def best(self) -> Table:
        """The best plans by the rule of the search; without a rule, those of the front come first."""
        result = self.result
        rule = result.rule
        front = result.front()
        ranked = sorted(result.whole[1:], key=lambda e: (not rule.admits(e), rule.free and e not in front, rule.key(e)))
        shown = ranked[: max(ROWS, len(front) if rule.free else 0)]
        rows = [
            [
                result.space.describe(e.plan) + (" (winner)" if e is result.winner else ""),
                f"{result.share(e):.1f} %",
                value(e),
                str(e.damage),
                interval(e),
            ]
            for e in shown
        ]
        metric = result.metric
        return ["plan", "K/V bytes", metric.name, f"damage [{metric.damage_unit}]", "95 % interval"], rows

    def settings(self) -> Table:
        """The settings that the figures depend on."""
        result = self.result
        header, summary = result.header, result.summary or {}
        rows = [[name, str(header[name])] for name in SETTINGS if header.get(name) not in (None, "", {})]
        rows = [[name, options(result) if name == "options" else value] for name, value in rows]
        rate = header.get("error_rate")
        stopped = sum(evaluation.stopped for evaluation in result.evaluations)
        spent = sum(evaluation.seconds for evaluation in result.evaluations)
        rows.append(["evaluations", f"{len(result.evaluations)}, of which {stopped} stopped early; {spent:,.1f} s"])
        if rate:
            rows.append(["error rate of early stopping", f"{rate:g}: the chance that it changed any winner of a round"])
        if "executor" in summary:
            rows.append(["executor", str(summary["executor"])])
        return ["setting", "value"], rows

    def commands(self) -> list[str]:
        """The commands that reproduce the search and convert the winner."""
        summary, header = self.result.summary or {}, self.result.header
        source, method = shlex.quote(str(summary.get("source_argument", "SRC"))), shlex.quote(str(header["method"]))
        found = [str(summary["command"])] if summary.get("command") else []
        if self.result.winner is not None:
            plan = shlex.quote(str(self.result.folder / BEST))
            calibrated = summary.get("calibration_arguments", "")
            found.append(f"mqadapt convert {source} DST --plan {plan} --method {method}{calibrated}")
        return [as_shell_again(command) for command in found]

    def notes(self) -> list[str]:
        """Explanations of the figures."""
        metric = self.result.metric
        notes = [
            (
                "Damage is the mean difference of losses to the source's on the same documents; its standard error and "
                "95 % interval (Student's t) treat documents as the sampling unit."
            ),
            (
                "The winner was selected on the same documents that it is reported on, so its damage is slightly "
                "underestimated; evaluate it on other text before relying on the last digit."
            ),
        ]
        if not self.result.header["documents"]:
            notes = [f"{metric.name} is computed from the merge's statistics: no documents, so no standard errors."]
        return notes

    def html(self) -> str:
        """The HTML page."""
        e = as_html
        figures = "".join(
            f'<section><h2>{e(HEADINGS[p.stem])}</h2><figure role="img" aria-label="{e(caption(self.result))}">'
            f"{_inline(p.with_suffix('.svg'))}</figure></section>"
            for p in self.pictures
        )
        # commands are not shortened
        commands = "".join(f"<pre><code>{html.escape(command)}</code></pre>" for command in self.commands())
        notes = "".join(f"<li>{e(note)}</li>" for note in self.notes())
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{e(self.title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{STYLE}</style></head><body><main><h1>{e(self.title)}</h1>"
            f'<p class="verdict">{e(self.verdict())}</p>{_table(self.facts())}{figures}'
            f"<section><h2>Plans</h2>{_table(self.best())}</section>"
            f"<section><h2>How to read this</h2><ul>{notes}</ul></section>"
            f"<section><h2>How to reproduce this</h2>{commands}{_table(self.settings())}</section>"
            "</main></body></html>\n"
        )

    def markdown(self) -> str:
        """The model card."""
        header, summary = self.result.header, self.result.summary or {}
        front = ["---"]
        if summary.get("base_model"):
            front.append(f"base_model: {_in_yaml(summary['base_model'])}")
        front += ["library_name: transformers", "tags:"]
        front += [f"- {_in_yaml(tag)}" for tag in ("mqadapt", "gqa" if self._grouped() else "mqa", header["method"])]
        e = as_markdown
        parts = [
            "\n".join(front) + "\n---",
            f"# {e(self.title)}",
            e(self.verdict()),
            _markdown_table(self.facts()),
            *(f"## {HEADINGS[p.stem]}\n\n![{e(caption(self.result))}](plots/{p.name})" for p in self.pictures),
            "## Plans\n\n" + _markdown_table(self.best()),
            "## How to read this\n\n" + "\n".join(f"- {e(note)}" for note in self.notes()),
            "## How to reproduce this\n\n" + "\n\n".join(map(as_code_block, self.commands())),
            _markdown_table(self.settings()),
        ]
        return "\n\n".join(parts) + "\n"

    def _grouped(self) -> bool:
        winner = self.result.winner
        return winner is not None and any(own > 1 for own in plan_record.counts(winner.plan))


def value(evaluation: Evaluation) -> str:
    """The value of the metric with its standard error."""
    if not evaluation.standard_error:
        return f"{evaluation.value:.4g}"
    return f"{evaluation.value:.4g} ± {evaluation.standard_error:.2g}"


def interval(evaluation: Evaluation) -> str:
    """The interval of the damage."""
    damage = evaluation.damage
    return "" if damage.low is None else f"{damage.low:.4g} to {damage.high:.4g}"


def options(result: Results) -> str:
    """The options of the strategy, in words."""
    parts = []
    for name, given in result.header["options"].items():
        values = given if isinstance(given, list) else [given]
        spelled = [
            result.space.describe(plan_record.layers(one)) if isinstance(one, list) else f"{one:.10g}" for one in values
        ]
        parts.append(f"{name}: {', '.join(spelled)}")
    return "; ".join(parts)


def changed(evaluation: Evaluation, result: Results) -> int:
    """The number of layers that a plan changes."""
    return sum(own != full for own, full in zip(evaluation.plan, result.space.source, strict=True))


def _inline(svg: Path) -> str:
    """Read an SVG without its XML prologue and size, with unique ids."""
    text = svg.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1, flags=re.S)
    # several figures in one document must not share ids
    stem = svg.stem
    text = re.sub(r'\bid="([^"]+)"', rf'id="{stem}-\1"', text)
    text = re.sub(r'href="#([^"]+)"', rf'href="#{stem}-\1"', text)
    return re.sub(r"url\(#([^)]+)\)", rf"url(#{stem}-\1)", text)


def _table(table: Table) -> str:
    head, rows = table
    cells = "".join(f"<th>{as_html(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + f"<th>{as_html(row[0])}</th>" + "".join(f"<td>{as_html(c)}</td>" for c in row[1:]) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def _markdown_table(table: Table) -> str:
    head, rows = table
    lines = [head, ["---"] * len(head), *(row + [""] * (len(head) - len(row)) for row in rows)]
    marked = [line if line is lines[1] else list(map(as_markdown, line)) for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in marked)


def _in_yaml(value: object) -> str:
    """Format a word of the front matter: quoted if YAML could interpret it."""
    text = readable(value)
    if re.fullmatch(r"[A-Za-z][\w./-]*", text, re.ASCII):
        return text
    return re.sub("[<>&`]", lambda sign: f"\\u{ord(sign[0]):04x}", json.dumps(text))


STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1a1a1a; font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
.verdict { border-left: .3rem solid #0072B2; padding: .4rem 0 .4rem .9rem; overflow-wrap: anywhere; }
figure { margin: 0; overflow-x: auto; }
figure svg { width: 100%; min-width: 34rem; max-height: 34rem; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; }
tbody th { font-weight: normal; min-width: 9rem; }
td { font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; font-size: .85rem; }
@media print { .scroll, figure, pre { overflow: visible; } pre { white-space: pre-wrap; } section { break-inside: avoid; } }
"""
