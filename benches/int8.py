"""8-bit weights against the stored ones: speed of scoring, prefill and decoding, and what they cost in perplexity.

    python benches/int8.py SRC --text FILE [--field page]

Both models are loaded once and take turns; the best of `--repeat` is printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import time


def main() -> None:
    """Prints both sides and their ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src")
    parser.add_argument("--text", required=True)
    parser.add_argument("--field", default="text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()

    from mqadapt_rs import Model
    from mqadapt_rs.search.evaluators.data import Data
    from mqadapt_rs.search.evaluators.model_spec import read_windows

    data = Data(text=arguments.text, field=arguments.field, context=arguments.context, windows=arguments.windows)
    ids = [token for window in read_windows(arguments.src, data, 0) for token in window]
    models = {weights: Model.load(arguments.src, weights=weights) for weights in ("stored", "int8")}
    found: dict[str, dict[str, float]] = {weights: {} for weights in models}

    def note(weights: str, what: str, tokens_per_second: float) -> None:
        found[weights][what] = max(found[weights].get(what, 0.0), tokens_per_second)

    for _ in range(arguments.repeat):
        for weights, model in models.items():
            start = time.perf_counter()
            found[weights]["perplexity"] = model.perplexity(ids, context=arguments.context)
            note(weights, "scoring", len(ids) / (time.perf_counter() - start))
        for weights, model in models.items():
            note(weights, "prefill 512", 512 / min(model.measure_prefill(512, 3)))
        for weights, model in models.items():
            times = sorted(model.measure_decode(64, 64))
            note(weights, "decode at 64", 1 / times[len(times) // 2])
    stored, int8 = found["stored"], found["int8"]
    ratios = {what: int8[what] / value for what, value in stored.items() if what != "perplexity"}
    cost = math.log(int8["perplexity"] / stored["perplexity"])
    print(json.dumps({**found, "int8/stored": ratios, "increase of log-perplexity": cost}, indent=1))


if __name__ == "__main__":
    main()
