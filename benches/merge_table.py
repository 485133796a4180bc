"""The table of docs/merge-methods.md: perplexity of merged layers at two contexts, on text apart from the calibration's.

    python benches/merge_table.py SRC ../shared/data/text/wikitext2_raw_valid_documents.jsonl.gz --field page

SRC is SmolLM2-135M-Instruct. Calibration: 8 x 2048 tokens of the first half of the text. Measured: 8192 tokens of the
second half, as 16 x 512 and as 4 x 2048.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

from mqadapt_rs import Calibration, Model, text

ROWS = {
    "20": "mqa:20",
    "29, 27, 25, 23, 21": "mqa:alternate5",
    "22 to 29": "mqa:last8",
    "every second (15)": "mqa:alternate15",
    "all": "mqa:all",
}
CONTEXTS = (512, 2048)
TOKENS = 8192


def undo_wikitext(words: str) -> str:
    """WikiText's spaces around punctuation taken back, so that the model reads ordinary text."""
    for split, joined in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), ("<unk>", "unk")):
        words = words.replace(split, joined)
    for mark in (",", ".", ";", ":", ")", "'s", "?", "!"):
        words = words.replace(" " + mark, mark)
    return words.replace("( ", "(")


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src")
    parser.add_argument("text", type=Path)
    parser.add_argument("--field", default="text")
    parser.add_argument("--rows", default=",".join(str(i) for i in range(len(ROWS))), help="numbers of the rows")
    parser.add_argument("--stats", type=Path, help="keep the statistics in this file")
    arguments = parser.parse_args()
    words = undo_wikitext("".join(text.read_documents(arguments.text, arguments.field)))
    ids = text.token_ids(text.load_tokenizer(arguments.src), words)
    half = len(ids) // 2
    calibration_ids = [ids[at : at + 2048] for at in range(0, 8 * 2048, 2048)]
    measured_ids = ids[half : half + TOKENS]
    base = Model.load(arguments.src, dtype="float32", precision="exact")
    losses = [math.log(base.perplexity(measured_ids, context)) for context in CONTEXTS]
    print("base", *(f"{math.exp(loss):.2f}" for loss in losses))
    print("| layers to one K/V head | method | T = 512 | share of mean's increase | T = 2048 | increase | seconds |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        stats = arguments.stats or Path(folder) / "stats"
        settings = {
            "mean": ("mean", None),
            "closed-form": ("closed-form", Calibration(calibration_ids, stats=stats)),
            "closed-form --sequential": ("closed-form", Calibration(calibration_ids, stats=stats, sequential=True)),
        }
        for name in [list(ROWS)[int(i)] for i in arguments.rows.split(",")]:
            mean = math.nan
            for label, (method, calibration) in settings.items():
                start = time.perf_counter()
                model = base.with_plan(ROWS[name], method, calibration=calibration)
                seconds = time.perf_counter() - start
                increases = [
                    math.log(model.perplexity(measured_ids, context)) - loss
                    for context, loss in zip(CONTEXTS, losses, strict=True)
                ]
                mean = increases[0] if label == "mean" else mean
                short, long = (math.exp(loss + more) for loss, more in zip(losses, increases, strict=True))
                print(
                    f"| {name} | {label} | {short:.2f} | {increases[0] / mean:.1%} | {long:.2f} | {increases[1]:.3f} "
                    f"| {seconds:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
