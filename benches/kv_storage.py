"""The tables of docs/kv-storage.md: what storing the K/V cache in integers costs, and how fast it is.

    python benches/kv_storage.py SRC ../shared/data/text/wikitext2_raw_valid_documents.jsonl.gz --field page
    python benches/kv_storage.py SRC --speed

The first: 8192 tokens of the second half of the text as 16 x 512 and as 4 x 2048, weights and cache in the dtype of the
checkpoint. Out: for every plan the share of the bytes of a token in the cache, perplexity, and the mean divergence of the
next-token distribution from that of the same model with its cache in float32. The second: prefill and decoding of every plan
beside the model as it is, taking turns; ratios of the best times.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from merge_table import MEASURED_TOKENS, undo_wikitext

from mqadapt_rs import Model, text

PLANS = ("keep", "keep@int8:all", "keep@int4:all")
CONTEXTS = (512, 2048)
STEPS = 32


def quality(arguments: argparse.Namespace) -> None:
    """Prints what each plan costs."""
    words = undo_wikitext("".join(text.read_documents(arguments.text, arguments.field)))
    ids = text.token_ids(text.load_tokenizer(arguments.src), words)
    measured = ids[len(ids) // 2 :][:MEASURED_TOKENS]
    source = Model.load(arguments.src)
    exact = Model.load(arguments.src, kv_dtype="float32")
    last = source.config.num_hidden_layers
    windows = {c: [measured[i : i + c] for i in range(0, MEASURED_TOKENS, c)] for c in arguments.contexts}
    references = {context: exact.hidden_before(last, texts) for context, texts in windows.items()}
    cells = [f"T = {context} | divergence" for context in arguments.contexts]
    print(f"| plan | share of bytes | {' | '.join(cells)} |\n{'|---' * (2 + 2 * len(cells))}|")
    for name in arguments.plans:
        model = source.with_plan(name, "mean")
        row = []
        for context, texts in windows.items():
            hidden = model.hidden_before(last, texts)
            divergence = float(np.mean(model.kl_divergence(references[context], hidden)))
            row.append(f"{model.perplexity(measured, context):.2f} | {divergence:.5f}")
        share = model.kv_bytes_per_token / source.kv_bytes_per_token
        print(f"| `{name}` | {share:.1%} | {' | '.join(row)} |", flush=True)


def speed(arguments: argparse.Namespace) -> None:
    """Prints how fast each plan is."""
    source = Model.load(arguments.src)
    models = {name: source.with_plan(name, "mean") for name in arguments.plans}
    rows = [("prefill", tokens) for tokens in arguments.prompts] + [("decode", depth) for depth in arguments.depths]
    print(f"| work | {' | '.join(f'`{name}`' for name in models)} |\n{'|---' * (1 + len(models))}|")
    for work, count in rows:
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(arguments.repeat):
            for name, model in models.items():
                if work == "prefill":
                    times[name] += model.measure_prefill(count, 1)
                else:
                    times[name].append(sum(model.measure_decode(count, STEPS)) / STEPS)
        first = min(times[arguments.plans[0]])
        cells = [f"{1e3 * min(own):.1f} ms, {first / min(own):.2f}x" for own in times.values()]
        print(f"| {work} {count} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Prints one of the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src")
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--field", default="text")
    parser.add_argument("--plans", nargs="+", default=PLANS, help="the first is what others are compared with")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--depths", nargs="+", type=int, default=[64, 2048, 8192])
    parser.add_argument("--prompts", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.speed:
        speed(arguments)
    elif arguments.text is None:
        parser.error("a text is needed, or --speed")
    else:
        quality(arguments)


if __name__ == "__main__":
    main()
