"""The table of docs/merge-methods.md: perplexity of merged layers at two contexts, on text apart from the calibration's.

    python benches/merge_table.py SRC ../shared/data/text/wikitext2_raw_valid_documents.jsonl.gz --field page --out table

SRC is SmolLM2-135M-Instruct. Measured: 8192 tokens of the second half of the text, as 16 x 512 and as 4 x 2048. Calibration:
tokens drawn from the first half as `load_calibration` draws them by default, one setting for all rows and both columns. With
`--dev` the last 8192 tokens of the first half are measured instead (nothing is ever drawn from them): choose settings with
that. `--tokens`, `--context` and `--seed` are those of `load_calibration`.

Statistics and measurements are kept in the folder `--out`; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

from mqadapt_rs import Calibration, Model, text
from mqadapt_rs.calibration import CONTEXT, TOKENS, draw_windows

ROWS = {
    "20": "mqa:20",
    "29, 27, 25, 23, 21": "mqa:alternate5",
    "22 to 29": "mqa:last8",
    "every second (15)": "mqa:alternate15",
    "all": "mqa:all",
}
CONTEXTS = (512, 2048)
MEASURED_TOKENS = 8192
METHODS = ("mean", "closed-form", "closed-form --sequential")


def undo_wikitext(words: str) -> str:
    """WikiText's spaces around punctuation taken back, so that the model reads ordinary text."""
    for split, joined in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "unk")):
        words = words.replace(split, joined)
    for mark in (",", ".", ";", ":", ")", "'s", "?", "!"):
        words = words.replace(" " + mark, mark)
    return words.replace("( ", "(")


class Table:
    """Measures cells, and keeps them in a file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        """Reads the text; the model is loaded when it is needed."""
        self.arguments = arguments
        words = undo_wikitext("".join(text.read_documents(arguments.text, arguments.field)))
        ids = text.token_ids(text.load_tokenizer(arguments.src), words)
        half = len(ids) // 2
        self.measured = ids[half - MEASURED_TOKENS : half] if arguments.dev else ids[half : half + MEASURED_TOKENS]
        lengths = [int(length) for length in arguments.context.split(",")]
        pool = ids[: half - MEASURED_TOKENS]
        self.drawn = draw_windows(pool, tokens=arguments.tokens, context=lengths, seed=arguments.seed)
        self.folder: Path = arguments.out
        self.folder.mkdir(parents=True, exist_ok=True)
        self.journal = self.folder / ("dev.jsonl" if arguments.dev else "table.jsonl")
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        self.cells = {(c["context"], c["row"], c["method"]): c for c in map(json.loads, lines)}
        self.merged: tuple[tuple[str, str], Model, float] | None = None

    @functools.cached_property
    def base(self) -> Model:
        """The model as it is."""
        return Model.load(self.arguments.src, dtype="float32", precision="exact")

    def cell(self, context: int, row: str, method: str) -> dict[str, float]:
        """Loss and seconds a layer; the row `base` is the model as it is."""
        key = (context, row, method)
        if key not in self.cells:
            model, seconds = (self.base, 0.0) if row == "base" else self.merge(row, method)
            loss = math.log(model.perplexity(self.measured, context))
            self.keep({"context": context, "row": row, "method": method, "loss": loss, "seconds": seconds})
        return self.cells[key]

    def merge(self, row: str, method: str) -> tuple[Model, float]:
        """The merged model, and seconds a layer; the last one is kept for the other contexts."""
        if self.merged is None or self.merged[0] != (row, method):
            self.merged = None
            calibration = None if method == "mean" else self.calibrated(method)
            begun = time.perf_counter()
            model = self.base.with_plan(ROWS[row], method.split()[0], calibration=calibration)
            self.merged = ((row, method), model, (time.perf_counter() - begun) / len(model.plan.changed_layers))
        return self.merged[1:]

    def calibrated(self, method: str) -> Calibration:
        """What a method is told; its statistics are collected first, so that no row pays for them."""
        stats = self.folder / "statistics"
        if not stats.exists():
            begun = time.perf_counter()
            plain = Calibration(self.drawn, stats=stats)
            self.base.with_plan("mqa:0", "closed-form", calibration=plain)
            seconds = (time.perf_counter() - begun) / self.base.config.num_hidden_layers
            self.keep({"context": 0, "row": "statistics", "method": "", "seconds": seconds})
        words = method.split()
        refine = int(words[words.index("--refine") + 1]) if "--refine" in words else 0
        return Calibration(self.drawn, stats=stats, sequential="--sequential" in words, refine=refine)

    def keep(self, cell: dict[str, Any]) -> None:
        """Takes down a measurement."""
        self.cells[cell["context"], cell["row"], cell["method"]] = cell
        with self.journal.open("a") as out:
            out.write(json.dumps(cell) + "\n")

    def line(self, row: str, method: str, contexts: list[int]) -> str:
        """One row of the table."""
        cells = []
        for context in contexts:
            base = self.cell(context, "base", "")["loss"]
            mean = self.cell(context, row, "mean")["loss"] - base
            cell = self.cell(context, row, method)
            more = cell["loss"] - base
            cells.append(f"{math.exp(base + more):.2f} | {more / mean:.1%} | {more:.3f} | {cell['seconds']:.1f}")
        return f"| {row} | {method} | {' | '.join(cells)} |"


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src")
    parser.add_argument("text", type=Path)
    parser.add_argument("--field", default="text")
    parser.add_argument("--out", type=Path, default=Path("merge-table"), help="folder of statistics and measurements")
    parser.add_argument("--rows", default=",".join(str(i) for i in range(len(ROWS))), help="numbers of the rows")
    parser.add_argument("--methods", default=",".join(METHODS), help="as on the command line, joined by commas")
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    parser.add_argument("--tokens", type=int, default=TOKENS, help="drawn for calibration")
    parser.add_argument("--context", default=",".join(map(str, CONTEXT)), help="lengths of the drawn windows")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn windows")
    parser.add_argument("--dev", action="store_true", help="measure the end of the first half")
    arguments = parser.parse_args()
    contexts = [int(context) for context in arguments.contexts.split(",")]
    table = Table(arguments)
    base = [f"{math.exp(table.cell(context, 'base', '')['loss']):.2f} at T = {context}" for context in contexts]
    print("base:", ", ".join(base), flush=True)
    cells = [f"T = {context} | share of mean's increase | increase | seconds a layer" for context in contexts]
    print(f"| layers to one K/V head | method | {' | '.join(cells)} |")
    print("|---" * (2 + 4 * len(contexts)) + "|")
    for row in [list(ROWS)[int(i)] for i in arguments.rows.split(",")]:
        for method in arguments.methods.split(","):
            print(table.line(row, method, contexts), flush=True)


if __name__ == "__main__":
    main()
