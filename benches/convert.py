"""Conversion beside `cp` and beside loading everything with PyTorch, all in one run.

    python benches/convert.py --size 3.4 --scratch /somewhere/with/room [--json out.json]

Makes a synthetic checkpoint (Llama-shaped, as many K/V heads as query heads, bf16, sharded, normally distributed weights),
then times, in turn and `--repeat` times each, `mqadapt convert` and `cp -r` of the same folder. Ratios are medians of the
ratios of neighbouring runs: the machine may be busy, both sides are equally slowed. Memory is the peak of the whole process
above that of `mqadapt --version`. Warm: the source is in the page cache; cold: it was dropped from it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

MQADAPT = [sys.executable, "-m", "mqadapt_rs.cli"]
PEER = Path(__file__).with_name("peer_convert.py")
# gigabytes: hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, shards
SHAPES = {
    "0.3": (768, 2048, 14, 12, 1),
    "3.4": (2048, 5632, 30, 16, 2),
    "13": (4096, 11008, 32, 32, 3),
}
VOCAB_SIZE = 32000


def make(folder: Path, size: str) -> None:
    """Writes the checkpoint."""
    import numpy as np  # here, so that the process that measures stays small: a child begins with its parent's peak

    hidden, intermediate, layers, heads, shards = SHAPES[size]
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"model.embed_tokens.weight": (VOCAB_SIZE, hidden), "lm_head.weight": (VOCAB_SIZE, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{name}.mlp.{p}_proj.weight": (intermediate, hidden) for p in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes |= {f"{name}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    values = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32) * np.float32(0.02)
    pool = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    names = sorted(shapes)
    weight_map = {}
    for shard in range(shards):
        own = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        weight_map |= dict.fromkeys(own, file)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in own:
            start, end = end, end + 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            while end > 0:
                out.write(pool[: min(end, len(pool))])
                end -= len(pool)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


@dataclass
class Run:
    seconds: float
    peak_rss: int  # bytes


def run(command: list[str]) -> Run:
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    return Run(time.perf_counter() - begun, usage.ru_maxrss * 1024)


def drop(folder: Path) -> None:
    """Drops the files from the page cache."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


class Bench:
    def __init__(self, source: Path, scratch: Path, repeat: int) -> None:
        self.source, self.ours, self.theirs, self.repeat = source, scratch / "ours", scratch / "theirs", repeat
        self.base = min(run([*MQADAPT, "--version"]).peak_rss for _ in range(3))
        self.results: dict[str, dict[str, float]] = {}

    def convert(self, *options: str) -> Run:
        return run([*MQADAPT, "convert", str(self.source), str(self.ours), *options])

    def copy(self, durable: bool) -> Run:
        begun = time.perf_counter()
        copied = run(["cp", "-r", str(self.source), str(self.theirs)])
        if durable:
            run(["sync", *map(str, self.theirs.iterdir()), str(self.theirs)])
        return Run(time.perf_counter() - begun, copied.peak_rss)

    def peer(self, plan: str) -> Run:
        return run([sys.executable, str(PEER), str(self.source), str(self.theirs), plan])

    def compare(
        self, name: str, ours: Callable[[], Run], theirs: Callable[[], Run], cold: bool, repeat: int = 0
    ) -> None:
        a: list[Run] = []
        b: list[Run] = []
        for turn in range(repeat or self.repeat):
            sides = [(ours, a, self.ours), (theirs, b, self.theirs)]
            for side, runs, folder in sides if turn % 2 == 0 else reversed(sides):
                os.sync()  # what went before is not on this side's bill
                drop(self.source) if cold else warm(self.source)
                runs.append(side())
                remove(folder)
        ratio = statistics.median(x.seconds / y.seconds for x, y in zip(a, b, strict=True))
        peak = max(x.peak_rss for x in a) - self.base
        self.results[name] = {
            "ours_seconds": statistics.median(x.seconds for x in a),
            "theirs_seconds": statistics.median(x.seconds for x in b),
            "ratio": ratio,
            "ours_extra_rss_mib": peak / 2**20,
            "theirs_rss_mib": max(x.peak_rss for x in b) / 2**20,
        }
        row = self.results[name]
        print(
            f"{name:<58} {row['ours_seconds']:7.2f} s {row['theirs_seconds']:7.2f} s  ratio {ratio:5.2f}"
            f"  memory {row['ours_extra_rss_mib']:6.1f} MiB against {row['theirs_rss_mib']:8.1f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="0.3", help="gigabytes of the checkpoint")
    parser.add_argument("--scratch", type=Path, required=True, help="folder with room for three of them")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", default="", help="run the rows whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--make", action="store_true", help="only make the checkpoint")
    args = parser.parse_args()
    source = args.scratch / f"synthetic-{args.size}"
    if args.make:
        make(source, args.size)
        return
    if not (source / "config.json").exists():
        run([sys.executable, __file__, "--make", "--size", args.size, "--scratch", str(args.scratch)])
    layers = SHAPES[args.size][2]
    half = f"mqa:alternate{layers // 2}"
    bench = Bench(source, args.scratch, args.repeat)
    size = sum(path.stat().st_size for path in source.iterdir())
    print(f"{source.name}: {size / 1e9:.2f} GB, normally distributed bf16 weights")
    print(f"`mqadapt --version` takes {bench.base / 2**20:.1f} MiB")

    def convert(*options: str) -> Callable[[], Run]:
        return lambda: bench.convert(*options)

    rows: list[tuple[str, Callable[[], Run], Callable[[], Run], bool]] = [
        ("every second layer, durable / cp -r + sync, warm", convert("--plan", half), lambda: bench.copy(True), False),
        ("every second layer, durable / cp -r + sync, cold", convert("--plan", half), lambda: bench.copy(True), True),
        (
            "every second layer, --no-sync / cp -r, warm",
            convert("--plan", half, "--no-sync"),
            lambda: bench.copy(False),
            False,
        ),
        (
            "every second layer, --no-sync / cp -r, cold",
            convert("--plan", half, "--no-sync"),
            lambda: bench.copy(False),
            True,
        ),
        (
            "all layers, --no-sync / cp -r, warm",
            convert("--plan", "mqa:all", "--no-sync"),
            lambda: bench.copy(False),
            False,
        ),
        (
            "--dtype f16, --no-sync / cp -r, warm",
            convert("--plan", "keep", "--dtype", "f16", "--no-sync"),
            lambda: bench.copy(False),
            False,
        ),
        (
            "every second layer, durable / load all with PyTorch, warm",
            convert("--plan", half),
            lambda: bench.peer(half),
            False,
        ),
    ]
    for name, ours, theirs, cold in rows:
        if args.only in name:
            bench.compare(name, ours, theirs, cold, repeat=1 if "PyTorch" in name else 0)
    if args.json:
        args.json.write_text(json.dumps({"size": size, "base_rss": bench.base, "rows": bench.results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
