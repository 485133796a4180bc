"""Damage of merged K/V heads in a trained GPT-2, whose positions are learned and not rotated.

    python benches/gpt2.py ../shared/data/checkpoints/capp-gpt

In: a GPT-2 that was trained on sequences of its own kind. No text of it is at hand, so the sequences are drawn from the model
itself: from its first token until its last one, at temperature 1. It says few different ones, so the different ones are divided:
those that are measured, each once, are in no calibration.
Out: a table: perplexity of every plan and method, and its increase in log-perplexity as a share of that of `mean`.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import warnings
from pathlib import Path

from mqadapt_rs import Calibration, Model

START, END = 49, 51  # <SOS>, <EOS>
PLANS = ("gqa2:all", "mqa:all")
METHODS = ("mean", "first", "prune", "closed-form", "closed-form --sequential")
LONGEST = 64


def drawn(model: Model, count: int) -> list[list[int]]:
    """Sequences of the model, from the start token to the end token."""
    out: list[list[int]] = []
    for seed in range(count):
        options = {"max_new_tokens": LONGEST, "temperature": 1.0, "stop_tokens": [END], "seed": seed}
        out.append([START, *model.generate([START], **options), END])
    return out


def log_perplexity(model: Model, sequences: list[list[int]]) -> float:
    """Mean negative log-likelihood of a token, in nats."""
    scores = model.loglikelihood([(ids[:1], ids[1:]) for ids in sequences])
    return -sum(score for score, _ in scores) / sum(len(ids) - 1 for ids in sequences)


def main() -> None:
    """Measures every plan and method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--sequences", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0, help="which of the different sequences are measured")
    given = parser.parse_args()
    source = Model.load(given.model)
    sequences = drawn(source, given.sequences)
    different = sorted({tuple(ids) for ids in sequences})
    random.Random(given.seed).shuffle(different)
    unseen = set(different[: len(different) // 2])
    text = [ids for ids in sequences if tuple(ids) not in unseen]
    measured = [list(ids) for ids in sorted(unseen)]
    print(f"{len(different)} different sequences of {len(sequences)}, {len(measured)} measured,", end=" ")
    print(f"{sum(map(len, text))} tokens of calibration, {sum(map(len, measured))} measured,", end=" ")
    print(f"{statistics.mean(map(len, sequences)):.1f} a sequence")
    before = log_perplexity(source, measured)
    print(f"source: perplexity {math.exp(before):.3f}")
    for plan in PLANS:
        increase: dict[str, float] = {}
        for method in METHODS:
            name, sequential = method.split()[0], method.endswith("--sequential")
            options = {}
            if name in ("prune", "closed-form"):
                contexts = [8, 16]
                options["calibration"] = Calibration(text, target_context=contexts, sequential=sequential)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                merged = Model.load(given.model, plan=plan, method=name, **options)
            after = log_perplexity(merged, measured)
            increase[method] = after - before
            share = increase[method] / increase["mean"]
            print(f"| `{plan}` | `{method}` | {math.exp(after):.3f} | {increase[method]:.4f} | {share:.1%} |")


if __name__ == "__main__":
    main()
