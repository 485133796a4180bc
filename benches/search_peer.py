"""A sensitivity study by the published procedure and by `mqadapt search`, in one run.

The published procedure writes a checkpoint for every layer, loads it in transformers and runs lm-eval's `hf` backend; here
it gets our converter, which is faster than its own. It is measured on a few layers and multiplied; the search does all.

    python benches/search_peer.py SRC --task hellaswag_indomain --include-path ../shared/tasks --limit 200
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path


def published(
    src: str, layer: int, task: str, include_path: str | None, limit: int, batch_size: int
) -> dict[str, float]:
    """Seconds of one layer's checkpoint, its loading and its evaluation, and the metric."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from mqadapt_rs import convert

    folder = Path(tempfile.mkdtemp(prefix="search-peer-"))
    try:
        start = time.perf_counter()
        convert(src, folder / "converted", plan=f"mqa:{layer}", method="mean")
        converted = time.perf_counter()
        lm = HFLM(
            str(folder / "converted"), dtype="bfloat16", batch_size=batch_size, device="cpu", trust_remote_code=True
        )
        loaded = time.perf_counter()
        results = lm_eval.simple_evaluate(
            lm, tasks=[task], task_manager=TaskManager(include_path=include_path), limit=limit, bootstrap_iters=0
        )
        done = time.perf_counter()
    finally:
        shutil.rmtree(folder)
    return {
        "convert": converted - start,
        "load": loaded - converted,
        "evaluate": done - loaded,
        "total": done - start,
        "acc_norm": results["results"][task]["acc_norm,none"],
    }


def main() -> None:
    """Prints both, and the ratio, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src")
    parser.add_argument("--task", default="hellaswag")
    parser.add_argument("--include-path")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--layers", default="7,21", help="layers that the published procedure is measured on")
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()

    from mqadapt_rs.search import search

    layers = [int(layer) for layer in arguments.layers.split(",")]
    peer = {}
    for layer in layers:
        peer[layer] = published(
            arguments.src, layer, arguments.task, arguments.include_path, arguments.limit, arguments.batch_size
        )
        print(json.dumps({"layer": layer, **peer[layer]}), flush=True)
    out = Path(tempfile.mkdtemp(prefix="search-peer-"))
    try:
        start = time.perf_counter()
        result = search(
            arguments.src,
            strategy="sensitivity",
            metric=f"task:{arguments.task}/acc_norm",
            include_path=arguments.include_path,
            limit=arguments.limit,
            counts=[1],
            out=out,
        )
        ours = time.perf_counter() - start
    finally:
        shutil.rmtree(out)
    singles = {e.plan.index(1): e.value for e in result.evaluations if e.plan.count(1) == 1}
    number = len(result.evaluations) - 1
    each = sum(timing["total"] for timing in peer.values()) / len(peer)
    print(
        json.dumps(
            {
                "published_seconds_per_layer": each,
                "published_seconds_extrapolated": each * number,
                "search_seconds": ours,
                "layers": number,
                "ratio": each * number / ours,
                "acc_norm": {layer: [peer[layer]["acc_norm"], singles.get(layer)] for layer in layers},
            }
        )
    )


if __name__ == "__main__":
    main()
