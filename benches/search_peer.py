"""A sensitivity study by the published procedure and by `mqadapt search`, in one run.

The published procedure writes a checkpoint for every layer and runs lm-eval's `hf` backend on it, a process each; here it gets
our converter, which is faster than its own. It is measured on a few layers and multiplied; the search does all, in one process,
whose start and loading count too.

    python benches/search_peer.py SRC --task hellaswag_indomain --include-path ../shared/tasks --limit 200
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run(*words: str) -> float:
    """Runs a Python module as a program of its own; seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def published(arguments: argparse.Namespace, layer: int, folder: Path) -> dict[str, float]:
    """Seconds of one layer's checkpoint and its evaluation, and the metric."""
    model, results = folder / f"layer{layer}", folder / f"layer{layer}.json"
    convert = run("mqadapt_rs.cli", "convert", arguments.src, str(model), "--plan", f"mqa:{layer}", "--method", "mean")
    words = ["lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", str(arguments.batch_size)]
    words += ["--model_args", f"pretrained={model},dtype=bfloat16,trust_remote_code=True"]
    words += ["--tasks", arguments.task, "--limit", str(arguments.limit), "--output_path", str(results)]
    if arguments.include_path:
        words += ["--include_path", arguments.include_path]
    evaluate = run(*words)
    (written,) = folder.glob(f"layer{layer}*.json")
    value = json.loads(written.read_text())["results"][arguments.task]["acc_norm,none"]
    return {"convert": convert, "evaluate": evaluate, "total": convert + evaluate, "acc_norm": value}


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

    layers = [int(layer) for layer in arguments.layers.split(",")]
    with tempfile.TemporaryDirectory(prefix="search-peer-") as scratch:
        folder = Path(scratch)
        words = ["search", arguments.src, "--strategy", "sensitivity", "--counts", "1", "--out", str(folder / "search")]
        words += ["--metric", f"task:{arguments.task}/acc_norm", "--limit", str(arguments.limit)]
        if arguments.include_path:
            words += ["--include-path", arguments.include_path]
        ours = run("mqadapt_rs.cli", *words)
        lines = (folder / "search" / "journal.jsonl").read_text().splitlines()
        evaluations = [json.loads(line) for line in lines[1:]]
        singles = {e["plan"].index(1): e["value"] for e in evaluations if e["plan"].count(1) == 1}
        print(json.dumps({"search": ours, "evaluating": sum(e["seconds"] for e in evaluations)}), flush=True)
        peer = {}
        for layer in layers:
            peer[layer] = published(arguments, layer, folder)
            print(json.dumps({"layer": layer, **peer[layer]}), flush=True)
    each = sum(timing["total"] for timing in peer.values()) / len(peer)
    found = {
        "published_seconds_per_layer": each,
        "published_seconds_extrapolated": each * len(singles),
        "search_seconds": ours,
        "layers": len(singles),
        "ratio": each * len(singles) / ours,
        "acc_norm": {layer: [peer[layer]["acc_norm"], singles.get(layer)] for layer in layers},
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
