"""The table of docs/merge-methods.md: perplexity of merged layers at two contexts, on text apart from the calibration's.

    python benches/merge_table.py SRC ../shared/data/text/wikitext2_raw_valid_documents.jsonl.gz --field page

SRC is SmolLM2-135M-Instruct. Measured: 8192 tokens of the second half of the text, as 16 x 512 and as 4 x 2048. Calibration:
16384 tokens drawn from the first half, for each column in windows of its context and for that target context. With `--dev`
the last 8192 tokens of the first half are measured instead (and nothing is drawn from them): choose settings with that.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from mqadapt_rs import Calibration, Model, text
from mqadapt_rs.calibration import draw_windows

ROWS = {
    "20": "mqa:20",
    "29, 27, 25, 23, 21": "mqa:alternate5",
    "22 to 29": "mqa:last8",
    "every second (15)": "mqa:alternate15",
    "all": "mqa:all",
}
CONTEXTS = (512, 2048)
TOKENS = 8192
CALIBRATION_TOKENS = 16384
METHODS = ("mean", "closed-form", "closed-form --sequential", "closed-form --refine 24")


def undo_wikitext(words: str) -> str:
    """WikiText's spaces around punctuation taken back, so that the model reads ordinary text."""
    for split, joined in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "unk")):
        words = words.replace(split, joined)
    for mark in (",", ".", ";", ":", ")", "'s", "?", "!"):
        words = words.replace(" " + mark, mark)
    return words.replace("( ", "(")


def options(method: str) -> dict[str, Any]:
    """What is said of a method behind its name."""
    words = method.split()
    refine = int(words[words.index("--refine") + 1]) if "--refine" in words else 0
    return {"sequential": "--sequential" in words, "refine": refine}


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src")
    parser.add_argument("text", type=Path)
    parser.add_argument("--field", default="text")
    parser.add_argument("--rows", default=",".join(str(i) for i in range(len(ROWS))), help="numbers of the rows")
    parser.add_argument("--methods", default=",".join(METHODS), help="as on the command line, joined by commas")
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    parser.add_argument("--stats", type=Path, help="keep the statistics in files of this name and the context")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration's windows")
    parser.add_argument("--dev", action="store_true", help="measure the end of the first half")
    arguments = parser.parse_args()
    words = undo_wikitext("".join(text.read_documents(arguments.text, arguments.field)))
    ids = text.token_ids(text.load_tokenizer(arguments.src), words)
    half = len(ids) // 2
    measured_ids = ids[half - TOKENS : half] if arguments.dev else ids[half : half + TOKENS]
    calibration_ids = ids[: half - TOKENS]
    contexts = [int(context) for context in arguments.contexts.split(",")]
    windows = {
        context: draw_windows(calibration_ids, tokens=CALIBRATION_TOKENS, context=context, seed=arguments.seed)
        for context in contexts
    }
    base = Model.load(arguments.src, dtype="float32", precision="exact")
    losses = {context: math.log(base.perplexity(measured_ids, context)) for context in contexts}
    print("base:", ", ".join(f"{math.exp(loss):.2f} at T = {context}" for context, loss in losses.items()), flush=True)
    cells = [f"T = {context} | share of mean's increase | increase | seconds a layer" for context in contexts]
    print(f"| layers to one K/V head | method | {' | '.join(cells)} |")
    print("|---" * (2 + 4 * len(contexts)) + "|")
    with tempfile.TemporaryDirectory() as folder:
        stats = arguments.stats or Path(folder) / "stats"
        for name in [list(ROWS)[int(i)] for i in arguments.rows.split(",")]:
            increase_of_mean = dict.fromkeys(contexts, math.nan)
            for method in arguments.methods.split(","):
                cells = []
                for context in contexts:
                    calibration = None
                    if method != "mean":
                        saved = stats.with_name(f"{stats.name}-{context}")
                        calibration = Calibration(
                            windows[context], target_context=[context], stats=saved, **options(method)
                        )
                        if not saved.exists():  # so that no row pays for it
                            begun = time.perf_counter()
                            base.with_plan(
                                "mqa:0",
                                "closed-form",
                                calibration=Calibration(windows[context], target_context=[context], stats=saved),
                            )
                            print(f"statistics at {context}: {time.perf_counter() - begun:.1f} s", flush=True)
                    begun = time.perf_counter()
                    model = base.with_plan(ROWS[name], method.split()[0], calibration=calibration)
                    seconds = time.perf_counter() - begun
                    increase = math.log(model.perplexity(measured_ids, context)) - losses[context]
                    if method == "mean":
                        increase_of_mean[context] = increase
                    cells.append(
                        f"{math.exp(losses[context] + increase):.2f} | {increase / increase_of_mean[context]:.1%} "
                        f"| {increase:.4f} | {seconds / len(model.plan.changed_layers):.1f}"
                    )
                print(f"| {name} | {method} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
