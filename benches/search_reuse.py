"""What the reuse of hidden states saves: a sensitivity study by `kl` against as many full forward passes, in one run.

    python benches/search_reuse.py SRC --text FILE --context 512 --windows 16

A full pass is what `Model.perplexity` runs: all layers, final norm, `lm_head`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Prints seconds and their ratio as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src")
    parser.add_argument("--text", required=True)
    parser.add_argument("--field", default="text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--passes", type=int, default=4, help="full passes that are measured and multiplied")
    arguments = parser.parse_args()

    from mqadapt_rs import Model
    from mqadapt_rs.search import search
    from mqadapt_rs.search.evaluators.data import Data
    from mqadapt_rs.search.evaluators.model_spec import read_windows

    data = Data(text=arguments.text, field=arguments.field, context=arguments.context, windows=arguments.windows)
    windows = read_windows(arguments.src, data, 0)
    model = Model.load(arguments.src)
    layers = model.config.num_hidden_layers
    ids = [token for window in windows for token in window]

    def passes(number: int) -> float:
        start = time.perf_counter()
        for _ in range(number):
            model.perplexity(ids, context=arguments.context)
        return (time.perf_counter() - start) / number

    passes(1)
    before = passes(arguments.passes // 2)
    out = Path(tempfile.mkdtemp(prefix="search-reuse-"))
    try:
        result = search(
            arguments.src,
            strategy="sensitivity",
            metric="kl",
            counts=[1],
            text=arguments.text,
            field=arguments.field,
            context=arguments.context,
            windows=arguments.windows,
            out=out,
        )
    finally:
        shutil.rmtree(out)
    after = passes(arguments.passes - arguments.passes // 2)
    spent = sum(evaluation.seconds for evaluation in result.evaluations)
    full = layers * (before + after) / 2
    print(
        json.dumps(
            {
                "layers": layers,
                "tokens": len(ids),
                "seconds_of_a_full_pass": [before, after],
                "search_seconds": spent,
                "full_passes_seconds": full,
                "ratio": spent / full,
            }
        )
    )


if __name__ == "__main__":
    main()
