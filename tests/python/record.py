"""Records what this commit gives, so that a redesign can be held against the commit before it.

    python tests/python/record.py run before.json [--model FOLDER_OR_GGUF]
    python tests/python/record.py compare before.json after.json

Recorded: SHA-256 of every file of converted folders (tiny models of every family, plain, sharded, cast, from GGUF, by every
method, and with `--model` a real one), of logits in f32 and bf16, the losses of a search's journal, and the class of the error
that each of many wrong inputs raises. The manifest `mqadapt.json` is recorded field by field, so that a renamed field is one
line of the comparison. Figures of two commits agree on one machine with the same instruction set only.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import mqadapt_rs as mq
import tiny

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TEXT = [tiny.ids(96, seed=1), tiny.ids(96, seed=2), tiny.ids(50, seed=3)]
PROBE = tiny.ids(60, seed=9)
ROWS = ("mean", "first", "random")
CALIBRATED: dict[str, dict[str, Any]] = {
    "prune": {},
    "closed-form": {},
    "closed-form --sequential": {"sequential": True},
    "closed-form --refine 2": {"refine": 2},
}
PASSING = ("mqadapt_version", "source")
"""Manifest fields that change with the version or hold a path."""


def digest(data: bytes) -> str:
    """SHA-256, shortened: enough to tell two files apart."""
    return hashlib.sha256(data).hexdigest()[:24]


def folder(path: Path) -> dict[str, str]:
    """Every file of a converted folder."""
    out = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        name = str(file.relative_to(path))
        if name != "mqadapt.json":
            out[name] = digest(file.read_bytes())
            continue
        for field, value in json.loads(file.read_text()).items():
            if field not in PASSING:
                out[f"{name}:{field}"] = digest(json.dumps(value, sort_keys=True).encode())
    return out


def logits(model: mq.Model, ids: list[int]) -> str:
    """The bits of all logits."""
    return digest(np.ascontiguousarray(model.logits(ids)).tobytes())


class Recorder:
    """Collects entries by name."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.entries: dict[str, Any] = {}
        self.numbers = itertools.count()

    def convert(self, name: str, src: Path, plan: Any, method: str, text: list[list[int]], **options: Any) -> Path:
        """A conversion, its folder, and that an overlay computes the same."""
        dst = self.work / f"out-{next(self.numbers)}"
        calibration = None
        if method in CALIBRATED:
            calibration = mq.Calibration(text, target_context=[32, 96], **CALIBRATED[method])
        plain = method.split()[0]
        mq.convert(src, dst, plan, plain, calibration=calibration, sync=False, **options)
        self.entries[f"{name} {method}"] = folder(dst)
        return dst


def tiny_families(record: Recorder) -> None:
    """Every family by every method: plain bf16, sharded f32, cast to f16; logits of both precisions."""
    for family in tiny.FAMILIES:
        plain = tiny.save(record.work / family, family, dtype="bfloat16")
        sharded = tiny.save(record.work / f"{family}-sharded", family, seed=1, max_shard_size="30KB")
        for method in (*ROWS, *CALIBRATED):
            for shape, src, options in (
                ("plain", plain, {}),
                ("sharded", sharded, {"max_shard_size": 40_000}),
                ("cast", plain, {"dtype": "float16"}),
            ):
                dst = record.convert(f"{family} {shape}", src, [6, 2, 1], method, TEXT, **options)
                for dtype in ("float32", "bfloat16"):
                    key = f"{family} {shape} {method} logits {dtype}"
                    record.entries[key] = logits(mq.Model.load(dst, dtype=dtype), PROBE)
        record.entries[f"{family} keep"] = folder(record.convert(f"{family} keep", plain, "keep", "mean", TEXT))
        stock = mq.Model.load(plain, device="cpu-stock")
        record.entries[f"{family} stock logits"] = logits(stock, PROBE)


def real(record: Recorder, src: Path) -> None:
    """A real model: import, last eight layers by every method, logits."""
    from mqadapt_rs import text as texts

    imported = record.work / "imported"
    mq.convert(src, imported, "keep", sync=False)
    record.entries["real import"] = folder(imported)
    words = (Path(__file__).parents[2] / "LICENSE").read_text()
    ids = texts.token_ids(texts.load_tokenizer(imported), words)
    windows = [ids[at * 256 : (at + 1) * 256] for at in range(8)]
    for method in (*ROWS, *CALIBRATED):
        dst = record.convert("real", imported, "mqa:last4", method, windows)
        record.entries[f"real {method} logits"] = logits(mq.Model.load(dst), ids[:64])
    for dtype in ("float32", "bfloat16"):
        record.entries[f"real logits {dtype}"] = logits(mq.Model.load(imported, dtype=dtype), ids[:128])


def searches(record: Recorder) -> None:
    """Losses of every evaluation of a search."""
    from mqadapt_rs.search import search

    src = record.work / "searched"
    words = (Path(__file__).parents[2] / "LICENSE").read_text()
    size = tiny.save_tokenizer(record.work, words)
    tiny.save(src, "llama", dtype="bfloat16", vocab_size=size, num_hidden_layers=4)  # 2 bytes a cached value
    tiny.save_tokenizer(src, words)
    text = record.work / "text.txt"
    text.write_text(words)
    for strategy, more in (
        ("sensitivity", {}),
        ("from-end", {}),
        ("alternate", {}),
        ("greedy", {"kv_budget": "50%"}),
        ("budget", {"kv_budget": "50%"}),
        ("pareto", {}),
    ):
        for metric in ("kl", "perplexity"):
            out = record.work / f"{strategy}-{metric}"
            search(src, strategy=strategy, out=out, metric=metric, text=text, context=64, windows=4, **more)
            lines = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()[1:]]
            kept = [
                {key: value for key, value in line.items() if key not in {"seconds", "line_blake2b"}} for line in lines
            ]
            record.entries[f"search {strategy} {metric}"] = [
                digest(json.dumps(k, sort_keys=True).encode()) for k in kept
            ]


def wrong_inputs(record: Recorder) -> Iterator[tuple[str, Callable[[], object]]]:
    """Wrong inputs, each with what is called."""
    src = tiny.save(record.work / "good", "llama")
    dst = record.work / "never"
    model = mq.Model.load(src)
    plans = (
        "mqa:99",
        "gqa4:all",
        "gqa0:all",
        "mqa:last9",
        "1,0",
        "nonsense",
        "mqa:2-1",
        [6, 6],
        [6, 6, 5],
        "none.json",
    )
    for plan in plans:
        yield f"plan {plan}", lambda plan=plan: mq.Plan.parse(plan, src)
        yield f"convert by {plan}", lambda plan=plan: mq.convert(src, dst, plan)
    for method in ("none", "closed-form", "prune"):
        yield f"method {method}", lambda method=method: mq.convert(src, dst, "mqa:0", method)
        yield f"overlay {method}", lambda method=method: mq.Model.load(src, "mqa:0", method)
    yield "no source", lambda: mq.convert(record.work / "absent", dst, "keep")
    yield "onto itself", lambda: mq.convert(src, src, "keep", overwrite=True)
    yield "exists", lambda: mq.convert(src, record.work, "keep")
    yield "dtype", lambda: mq.Model.load(src, dtype="int3")
    yield "device", lambda: mq.Model.load(src, device="tpu")
    yield "token", lambda: model.logits([10**6])
    yield "no tokens", lambda: model.logits([])
    yield "target context", lambda: mq.Calibration(TEXT, target_context=[0])
    yield "not converted", lambda: mq.verify(src)
    for field, value in (
        ("model_type", "unknown"),
        ("hidden_size", 0),
        ("num_key_value_heads", 5),
        ("head_dim", 7),
        ("hidden_act", "none"),
        ("rope_scaling", {"rope_type": "none"}),
    ):
        broken = record.work / f"broken-{field}"
        broken.mkdir()
        config = json.loads((src / "config.json").read_text()) | {field: value}
        (broken / "config.json").write_text(json.dumps(config))
        (broken / "model.safetensors").write_bytes((src / "model.safetensors").read_bytes())
        yield f"config {field}", lambda broken=broken: mq.inspect(broken)
    cut = record.work / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((src / "config.json").read_bytes())
    (cut / "model.safetensors").write_bytes((src / "model.safetensors").read_bytes()[:-9])
    yield "cut shard", lambda: mq.convert(cut, dst, "keep")


def errors(record: Recorder) -> None:
    """The class of the error of every wrong input; `none` where there is none."""
    for name, call in wrong_inputs(record):
        try:
            call()
            found = "none"
        except Exception as error:  # noqa: BLE001 what it is gets recorded
            found = type(error).__name__
        record.entries[f"error: {name}"] = found


def run(out: Path, model: Path | None) -> None:
    """Records everything."""
    with tempfile.TemporaryDirectory() as work:
        record = Recorder(Path(work))
        tiny_families(record)
        searches(record)
        errors(record)
        if model is not None:
            real(record, model)
        out.write_text(json.dumps(record.entries, indent=1, sort_keys=True) + "\n")
    print(f"{len(record.entries)} entries in {out}")


def flat(entries: dict[str, Any]) -> dict[str, Any]:
    """One name for every value."""
    out = {}
    for name, value in entries.items():
        if isinstance(value, dict):
            out.update({f"{name} / {key}": inner for key, inner in value.items()})
        else:
            out[name] = value
    return out


def compare(before: Path, after: Path) -> int:
    """Prints what differs, a line each; returns how much that is."""
    old, new = (flat(json.loads(path.read_text())) for path in (before, after))
    differing = 0
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            differing += 1
            print(f"{name}: {old.get(name, 'absent')} -> {new.get(name, 'absent')}")
    print(f"{len(old)} values before, {len(new)} after, {differing} differ")
    return differing


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="record this commit")
    running.add_argument("out", type=Path)
    running.add_argument("--model", type=Path, help="a real model: a folder or a .gguf file")
    comparing = commands.add_parser("compare", help="compare two records")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.out, arguments.model)
    else:
        sys.exit(compare(arguments.before, arguments.after) > 0)


if __name__ == "__main__":
    main()
