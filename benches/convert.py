"""Conversion beside `cp` and beside loading everything with PyTorch, all in one run.

    python benches/convert.py --size 3.4 --scratch /somewhere/with/room [--json out.json]

Makes the sources (`synthetic.py`), then times, in turn and `--repeat` times each, `mqadapt convert` and `cp -r` of the
safetensors folder (a GGUF source becomes just as many bytes). Ratios are medians of the ratios of neighbouring runs: the
machine may be busy, both sides are equally slowed. Memory is the peak of the whole process above that of `mqadapt --version`.
Warm: the source is in the page cache; cold: it was dropped from it. Before each run as much memory as the output needs is
touched and given back: a virtual machine's host may take free memory away within seconds, and then the first touch of it costs
several times what copying costs, whoever's turn it is (here 16 GB took 1.1 s right after they were freed, 35 s later).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from synthetic import SHAPES, make, make_gguf

if TYPE_CHECKING:
    from collections.abc import Callable

MQADAPT = [sys.executable, "-m", "mqadapt_rs.cli"]
PEER = Path(__file__).with_name("peer_convert.py")


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


def files(source: Path) -> list[Path]:
    return sorted(source.iterdir()) if source.is_dir() else [source]


def drop(source: Path) -> None:
    """Drops the files from the page cache."""
    for path in files(source):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(source: Path) -> None:
    for path in files(source):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


# in a process of its own: a child's peak of memory counts what its parent held
TOUCH = """
import mmap, sys
with mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
    memory.madvise(mmap.MADV_HUGEPAGE)
    for at in range(0, len(memory), mmap.PAGESIZE):
        memory[at] = 1
"""


def touch(size: int) -> None:
    """Has this many bytes of memory backed by the machine, and frees them."""
    run([sys.executable, "-c", TOUCH, str(size)])


class Row(NamedTuple):
    """One comparison."""

    name: str
    options: list[str]
    source: Path
    durable: bool = False
    cold: bool = False
    peer: bool = False


class Bench:
    def __init__(self, folder: Path, repeat: int) -> None:
        self.folder, self.repeat = folder, repeat
        self.ours, self.theirs = folder.parent / "ours", folder.parent / "theirs"
        self.base = min(run([*MQADAPT, "--version"]).peak_rss for _ in range(3))
        self.results: dict[str, dict[str, object]] = {}

    def convert(self, row: Row) -> Run:
        return run([*MQADAPT, "convert", str(row.source), str(self.ours), *row.options])

    def other(self, row: Row) -> Run:
        if row.peer:
            return run([sys.executable, str(PEER), str(self.folder), str(self.theirs), row.options[1]])
        begun = time.perf_counter()
        copied = run(["cp", "-r", str(self.folder), str(self.theirs)])
        if row.durable:
            run(["sync", *map(str, self.theirs.iterdir()), str(self.theirs)])
        return Run(time.perf_counter() - begun, copied.peak_rss)

    def compare(self, row: Row) -> None:
        output = sum(path.stat().st_size for path in self.folder.iterdir())
        a: list[Run] = []
        b: list[Run] = []
        for turn in range(self.repeat):
            sides: list[tuple[Callable[[Row], Run], list[Run], Path]]
            sides = [(self.convert, a, self.ours), (self.other, b, self.theirs)]
            for side, runs, folder in sides if turn % 2 == 0 else reversed(sides):
                os.sync()  # what went before is not on this side's bill
                for source in {row.source, self.folder}:
                    drop(source) if row.cold else warm(source)
                touch(min(2 * output, 8 << 30))  # within what a machine has free
                runs.append(side(row))
                remove(folder)
        ratios = sorted(x.seconds / y.seconds for x, y in zip(a, b, strict=True))
        ratio = statistics.median(ratios)
        ours, theirs = (statistics.median(x.seconds for x in runs) for runs in (a, b))
        memory, their_memory = max(x.peak_rss for x in a) - self.base, max(x.peak_rss for x in b)
        self.results[row.name] = {
            "ours_seconds": [x.seconds for x in a],
            "theirs_seconds": [x.seconds for x in b],
            "ratio": ratio,
            "ours_extra_rss": memory,
            "theirs_rss": their_memory,
        }
        print(
            f"{row.name:<58} {ours:6.2f} s {theirs:6.2f} s  ratio {ratio:5.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            f"  memory {memory / 2**20:5.1f} MiB against {their_memory / 2**20:7.1f}",
            flush=True,
        )


def rows(folder: Path, gguf: Path, layers: int) -> list[Row]:
    half = ["--plan", f"mqa:alternate{layers // 2}"]
    return [
        Row("every second layer, durable / cp -r + sync, warm", half, folder, durable=True),
        Row("every second layer, durable / cp -r + sync, cold", half, folder, durable=True, cold=True),
        Row("every second layer, --no-sync / cp -r, warm", [*half, "--no-sync"], folder),
        Row("every second layer, --no-sync / cp -r, cold", [*half, "--no-sync"], folder, cold=True),
        Row("all layers, --no-sync / cp -r, warm", ["--plan", "mqa:all", "--no-sync"], folder),
        Row("--dtype f16, --no-sync / cp -r, warm", ["--plan", "keep", "--dtype", "f16", "--no-sync"], folder),
        Row("GGUF Q4_0 to bf16, --no-sync / cp -r of as much, warm", ["--plan", "keep", "--no-sync"], gguf),
        Row("every second layer, durable / load all with PyTorch, warm", half, folder, peer=True),
        Row("every second layer, --no-sync / load all with PyTorch, warm", [*half, "--no-sync"], folder, peer=True),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="0.3", help="gigabytes of the checkpoint")
    parser.add_argument("--scratch", type=Path, required=True, help="folder with room for three of them")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--only", default="", help="run the rows whose name contains this")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--make", action="store_true", help="only make the sources")
    args = parser.parse_args()
    folder, gguf = args.scratch / f"synthetic-{args.size}", args.scratch / f"synthetic-{args.size}.gguf"
    if args.make:
        make(folder, args.size)
        make_gguf(gguf, args.size)
        return
    if not ((folder / "config.json").exists() and gguf.exists()):
        run([sys.executable, __file__, "--make", "--size", args.size, "--scratch", str(args.scratch)])
    bench = Bench(folder, args.repeat)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder.name}: {size / 1e9:.2f} GB, normally distributed bf16 weights; {bench.repeat} runs of each side")
    print(f"`mqadapt --version` takes {bench.base / 2**20:.1f} MiB")
    for row in rows(folder, gguf, SHAPES[args.size].num_hidden_layers):
        if args.only in row.name:
            bench.compare(row)
    if args.json:
        args.json.write_text(json.dumps({"size": size, "base_rss": bench.base, "rows": bench.results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
