"""Figures of searches, for screen and print.

In: folders of searches (several share the same figures, to compare methods). Out: PNG and SVG files, one figure for each question
that the evaluations answer. The colours are those of Okabe and Ito; methods and counts also differ by hatch, marker and line.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mqadapt_rs import files, output_files
from mqadapt_rs.errors import ArgumentError
from mqadapt_rs.readable import readable
from mqadapt_rs.search.core.plan_record import count
from mqadapt_rs.search.results import Results

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mqadapt_rs._core import LayerCache
    from mqadapt_rs.search.core.evaluation import Evaluation

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
HATCHES = ("", "///", "...", "xx", "\\\\\\", "++", "oo")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "mqadapt",  # fixed, so that the same search gives the same bytes
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "text.parse_math": False,  # a dollar sign in a name does not start a formula
}


def plot(
    *folders: str | os.PathLike[str], out: str | os.PathLike[str] | None = None, latency: Path | None = None
) -> list[Path]:
    """Plot all figures for which the searches have data.

    Args:
        folders: folders of searches.
        out: output folder; by default `plots` in the first folder.
        latency: output of `mqadapt bench --json`, for the figure of latency against K/V heads.

    Returns:
        The PNG files; each has an SVG file of the same name beside it.

    Raises:
        ArgumentError: there is nothing to plot, a folder holds no search, or the searches have different metrics.
        ImportError: matplotlib is not installed (extra `plot`).
    """
    import matplotlib as mpl

    if not folders:
        raise ArgumentError("nothing to plot: expected the folder of a search")
    results = [Results.load(Path(folder)) for folder in folders]
    metrics = {result.metric for result in results}
    if len(metrics) > 1:
        names = ", ".join(sorted(metric.name for metric in metrics))
        raise ArgumentError(f"searches of different metrics cannot share a figure: {names}")
    if out is not None:
        target = Path(out)
        target.mkdir(parents=True, exist_ok=True)
    else:
        target = Path(folders[0]) / "plots"
        output_files.make_folder(target)
    written = []
    with mpl.rc_context(STYLE):
        for name, figure in _figures(results, latency):
            for ending in ("png", "svg"):
                metadata = {"Date": None} if ending == "svg" else None
                picture = io.BytesIO()
                figure.savefig(picture, format=ending, dpi=160, metadata=metadata)
                output_files.write(target / f"{name}.{ending}", picture.getvalue())
            written.append(target / f"{name}.png")
    if not written:
        raise ArgumentError(f"nothing to plot yet: {results[0].folder} holds only the evaluation of the source")
    return written


def _figures(results: Sequence[Results], latency: Path | None) -> Iterator[tuple[str, Figure]]:
    if any(len(by_layer) > 1 for result in results for by_layer in result.singles().values()):
        yield "sensitivity", sensitivity(results)
    for name, pattern, words in (
        ("from-end", "last", "the last layers"),
        ("alternate", "alternate", "every second layer from the end"),
    ):
        if any(len(series) > 2 for result in results for series in result.pattern(pattern).values()):
            yield name, curve(results, pattern, words)
    if any(len(result.whole) > 2 for result in results):
        yield "pareto", pareto(results)
    if any(result.winner is not None for result in results):
        yield "plan", strip(results)
    if latency is not None:
        yield "latency", latency_against_groups(latency)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)  # no display, no global state
    return figure, figure.add_subplot()


def _series(results: Sequence[Results]) -> list[str]:
    """The labels of the searches: the method, or the folder if methods repeat."""
    methods = [_label(result.header["method"]) for result in results]
    return methods if len(set(methods)) == len(methods) else [_label(result.folder.name) for result in results]


def _label(text: object) -> str:
    """Shorten a name for a figure."""
    name = readable(text)
    return name if len(name) <= 48 else f"{name[:30]} ... {name[-13:]}"


def _titled(axes: Axes, question: str, results: Sequence[Results]) -> None:
    first = results[0]
    models = dict.fromkeys(_label(result.header.get("name", "")) for result in results)
    methods = dict.fromkeys(_label(result.header["method"]) for result in results)
    number = first.header["documents"]
    parts = [
        ", ".join(name for name in models if name),
        f"merged by {', '.join(methods)}",
        f"{number} documents" if number else "",
    ]
    axes.set_title(question, loc="left", fontsize=11, fontweight="bold", pad=22)
    words = " | ".join(part for part in parts if part)
    below = axes.text(0, 1.03, words, transform=axes.transAxes, fontsize=8, color="#444444")
    below.set_in_layout(False)  # a long line must not shrink the axes


def _damage_axis(axes: Axes, results: Sequence[Results], shown: Sequence[Evaluation]) -> None:
    """Label the axis of damage; its scale is symmetric logarithmic if a few values would hide all others."""
    metric = results[0].metric
    sizes = sorted(abs(evaluation.damage.mean) for evaluation in shown if evaluation.damage.mean)
    errors = any(evaluation.damage.standard_error for evaluation in shown)
    change = "loss" if metric.scale == "negative" else "increase"
    # one line each, since units are long
    label = f"damage: {metric.name} {change}\n[{metric.damage_unit}]" + ("\n95 % interval" if errors else "")
    if len(sizes) > 3 and sizes[-1] > 12 * sizes[len(sizes) // 2]:
        axes.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(sizes[len(sizes) // 4])), linscale=0.5)
        label += (", " if errors else "\n") + "symmetric log scale"
    axes.set_ylabel(label)
    axes.axhline(0, color="black", linewidth=0.8)


def _errors(evaluations: Sequence[Evaluation]) -> Any:
    """Lengths of the error bars below and above, or `None` if there are none."""
    if any(evaluation.damage.low is None for evaluation in evaluations):
        return None
    below = [e.damage.mean - (e.damage.low or 0.0) for e in evaluations]
    above = [(e.damage.high or 0.0) - e.damage.mean for e in evaluations]
    return [below, above]


def _heads(choice: LayerCache) -> str:
    return f"{count(choice)} K/V head" + ("s" if count(choice) > 1 else "")


def sensitivity(results: Sequence[Results]) -> Figure:
    """Plot the damage of each layer alone as bars."""
    named = zip(_series(results), results, strict=True)
    series = [(name, choice, layers) for name, result in named for choice, layers in result.singles().items()]
    number = results[0].space.num_hidden_layers
    figure, axes = _figure(max(6.0, 0.24 * number * min(3, len(series)) ** 0.5 + 2), 3.6)
    width = 0.8 / len(series)
    for index, (name, choice, layers) in enumerate(series):
        evaluations = list(layers.values())
        axes.bar(
            [layer + (index - (len(series) - 1) / 2) * width for layer in layers],
            [evaluation.damage.mean for evaluation in evaluations],
            width,
            yerr=_errors(evaluations),
            error_kw={"elinewidth": 0.8, "capsize": 1.5 if number * len(series) < 100 else 0},
            label=f"{name}, {_heads(choice)}",
            color=COLOURS[index % len(COLOURS)],
            hatch=HATCHES[index % len(HATCHES)],
            edgecolor="white" if not HATCHES[index % len(HATCHES)] else "black",
            linewidth=0.4,
        )
    _titled(axes, "Which layers can do with fewer K/V heads?", results)
    _damage_axis(axes, results, [e for _, _, layers in series for e in layers.values()])
    axes.set_xlabel("the one layer that is changed")
    axes.set_xticks(range(0, number, 1 if number <= 32 else 4))
    axes.set_xlim(-0.7, number - 0.3)
    axes.legend(ncols=min(3, len(series)), fontsize=8)
    return figure


def curve(results: Sequence[Results], pattern: str, words: str) -> Figure:
    """Plot damage against the number of layers that follow a pattern."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(6, 3.8)
    named = zip(_series(results), results, strict=True)
    series = [(name, choice, found) for name, result in named for choice, found in result.pattern(pattern).items()]
    for index, (name, choice, found) in enumerate(series):
        evaluations = list(found.values())
        axes.errorbar(
            list(found),
            [evaluation.damage.mean for evaluation in evaluations],
            yerr=_errors(evaluations),
            label=f"{name}, {_heads(choice)}",
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle=LINES[index % len(LINES)],
            capsize=2,
            markersize=5,
        )
    _titled(axes, f"Fewer K/V heads in {words}", results)
    _damage_axis(axes, results, [evaluation for _, _, found in series for evaluation in found.values()])
    axes.set_xlabel(f"number of layers changed: {words}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    return figure


def pareto(results: Sequence[Results]) -> Figure:
    """Plot K/V bytes against damage: every plan, the front, the winner."""
    figure, axes = _figure(6, 4.2)
    shown: list[Evaluation] = []
    for index, (name, result) in enumerate(zip(_series(results), results, strict=True)):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        shown += result.whole
        best = result.front()
        others = [evaluation for evaluation in result.whole if evaluation not in best]
        axes.scatter(
            [result.share(evaluation) for evaluation in others],
            [evaluation.damage.mean for evaluation in others],
            s=12,
            marker=marker,
            facecolors="none",
            edgecolors=colour,
            linewidths=0.7,
            alpha=0.6,
        )
        axes.errorbar(
            [result.share(evaluation) for evaluation in best],
            [evaluation.damage.mean for evaluation in best],
            yerr=_errors(best),
            color=colour,
            marker=marker,
            linestyle=LINES[index % len(LINES)],
            capsize=2,
            markersize=5,
            label=f"{name}: front of {len(result.whole)} plans",
        )
        if result.winner is not None:
            axes.plot(
                [result.share(result.winner)],
                [result.winner.damage.mean],
                marker="*",
                markersize=14,
                color=colour,
                markeredgecolor="black",
                linestyle="none",
                label=f"{name}: winner",
            )
    size = results[0].source.kv_bytes
    _titled(axes, "What K/V memory costs in quality", results)
    _damage_axis(axes, results, shown)
    axes.set_xlabel(f"K/V bytes per token [% of the source's {size:,}]")
    if len(results) > 2:  # a long legend would hide the plans
        figure.set_figheight(5.2)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    else:
        axes.legend(fontsize=8)
    return figure


def strip(results: Sequence[Results]) -> Figure:
    """Plot the K/V heads of the winner, layer by layer."""
    rows = [(name, r, r.winner) for name, r in zip(_series(results), results, strict=True) if r.winner is not None]
    number = results[0].space.num_hidden_layers
    figure, axes = _figure(max(6.0, 0.27 * number + 2), 1.3 + 0.42 * len(rows))
    greys = (1.0, 0.28)  # fewer bytes are lighter
    for row, (_, result, winner) in enumerate(rows):
        for layer, own in enumerate(winner.plan):
            sizes = result.space.layer_bytes[layer]
            share = sizes[own] / sizes[result.space.source[layer]]
            grey = greys[0] + (greys[1] - greys[0]) * share
            colour = (grey, grey + 0.25 * (1 - grey) * share, min(1.0, grey + 0.55 * (1 - grey) * share))
            axes.add_patch(_box(layer, row, colour))
            axes.text(
                layer,
                row,
                str(count(own)),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if share > 0.6 else "black",
            )
    axes.set_xlim(-0.6, number - 0.4)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.set_yticks(range(len(rows)), [f"{name}\n{result.share(w):.0f} % of the bytes" for name, result, w in rows])
    axes.set_xticks(range(0, number, 1 if number <= 32 else 4))
    axes.set_xlabel("layer")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    _titled(axes, "The winning plan: K/V heads of each layer", results)
    return figure


def _box(layer: int, row: int, colour: tuple[float, float, float]) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((layer - 0.46, row - 0.4), 0.92, 0.8, facecolor=colour, edgecolor="#555555", linewidth=0.6)


def latency_against_groups(file: Path) -> Figure:
    """Plot the latency of a decoded token against the K/V heads of all layers, one curve per depth."""
    try:
        return _latency(files.read_json(file))
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as problem:
        raise ArgumentError(f"{file}: not what 'mqadapt bench --groups ... --json' writes ({problem!r})") from None


def plot_latency(report: Mapping[str, Any], file: str | os.PathLike[str]) -> None:
    """Plot the latencies that `bench` returned; the suffix of the file (`.png`, `.svg`, `.pdf`) is its format.

    Raises:
        ImportError: matplotlib is not installed (extra `plot`).
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = _latency(report)
        figure.savefig(file, dpi=160)


def _latency(report: Mapping[str, Any]) -> Figure:
    points = [
        (int(row["depth"]), float(row["num_key_value_heads"]), float(row["milliseconds_per_token"]))
        for row in report["decode"]
    ]
    figure, axes = _figure(5, 3.6)
    for index, depth in enumerate(sorted({point[0] for point in points})):
        line = sorted((heads, time) for own, heads, time in points if own == depth)
        axes.plot(
            [heads for heads, _ in line],
            [time for _, time in line],
            label=f"{depth:,} tokens in the cache",
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            linestyle=LINES[index % len(LINES)],
        )
    axes.set_title(
        f"{_label(Path(str(report['model'])).name)}, {_label(report['dtype'])}, best of {_label(report['rounds'])} rounds",
        loc="left",
        fontsize=8,
        color="#444444",
    )
    figure.suptitle("What fewer K/V heads gain in time", x=0.02, ha="left", fontsize=11, fontweight="bold")
    axes.set_xlabel("K/V heads of a layer (mean over the layers)")
    axes.set_ylabel("time of a decoded token [ms]")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def caption(result: Results) -> str:
    """The alternative text of the figures."""
    winner = result.winner
    if winner is None:
        return f"{len(result.evaluations)} plans of {result.title}."
    return f"{len(result.evaluations)} plans of {result.title}; the winner is {result.space.describe(winner.plan)}."
