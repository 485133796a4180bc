"""Every kind of error in Rust becomes the Python exception that it should, with its message."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import mqadapt_rs as mq
from mqadapt_rs import ArgumentError, MqadaptError

ROOT = Path(__file__).resolve().parents[2]
Case = Callable[[Path, Path], object]  # called with a copy of a good checkpoint and an empty folder


def header(change: Callable[[dict[str, dict[str, list[int]]]], object]) -> Case:
    """Opens a checkpoint whose safetensors header was changed."""

    def case(model: Path, _: Path) -> object:
        file = model / "model.safetensors"
        raw = file.read_bytes()
        (length,) = struct.unpack_from("<Q", raw)
        entries = json.loads(raw[8 : 8 + length])
        change(entries)
        text = json.dumps(entries).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
        return mq.inspect(model)

    return case


def raw(content: bytes) -> Case:
    """Opens a checkpoint whose weights are these bytes."""
    return lambda model, _: ((model / "model.safetensors").write_bytes(content), mq.inspect(model))


def config(**fields: object) -> Case:
    """Opens a checkpoint whose configuration was changed."""

    def case(model: Path, _: Path) -> object:
        file = model / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
        return mq.inspect(model)

    return case


def plan(text: str) -> Case:
    return lambda model, _: mq.Plan.parse(text, model)


def index(content: str) -> Case:
    def case(model: Path, _: Path) -> object:
        (model / "model.safetensors").rename(model / "a.safetensors")
        (model / "model.safetensors.index.json").write_text(content)
        return mq.inspect(model)

    return case


def convert(src: str = "", dst: str = "out", **options: object) -> Case:
    return lambda model, out: mq.convert(model / src, out / dst, **options)  # type: ignore[arg-type]


def occupied(*names: str, folder: str = "out", **options: object) -> Case:
    """Converts into a folder where one holds these files."""

    def case(model: Path, out: Path) -> object:
        (out / folder).mkdir()
        for name in names:
            (out / folder / name).write_text("{}")
        return mq.convert(model, out / "out", **options)  # type: ignore[arg-type]

    return case


def appearing() -> Case:
    """Converts into a folder that appears meanwhile."""
    return lambda model, out: mq.convert(model, out / "out", progress=lambda *_: (out / "out").mkdir(exist_ok=True))


def unfinished(**options: object) -> Case:
    """Converts where a conversion was interrupted before."""

    def case(model: Path, out: Path) -> object:
        with pytest.raises(ZeroDivisionError):
            mq.convert(model, out / "out", resume=True, progress=lambda *_: 1 / 0)
        return mq.convert(model, out / "out", **options)  # type: ignore[arg-type]

    return case


def run(call: Callable[[mq.Model], object], **options: object) -> Case:
    return lambda model, _: call(mq.Model.load(model, **options))  # type: ignore[arg-type]


def first(entries: dict[str, dict[str, list[int]]]) -> dict[str, list[int]]:
    """The tensor that lies first in the file."""
    return min((e for name, e in entries.items() if name != "__metadata__"), key=lambda e: e["data_offsets"][0])


A_KEY = "model.layers.1.self_attn.k_proj.weight"
TWICE = b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[],"data_offsets":[4,8]}}'
# crate::variant -> what provokes it, the exception, a piece of the message; or why it cannot be provoked from Python
KINDS: dict[str, tuple[Case, type[BaseException], str] | str] = {
    "core::Syntax": (lambda *_: mq.ModelConfig.from_json("{"), MqadaptError, "config.json cannot be read"),
    "core::UnknownModelType": (
        config(model_type="mamba"),
        MqadaptError,
        "'mamba' is unknown; the nearest is 'llama'; supported are",
    ),
    "core::UnknownFamily": (lambda *_: mq.register_family("mine", "lama"), ArgumentError, "'lama' does not exist"),
    "core::KnownModelType": (lambda *_: mq.register_family("gemma", "llama"), ArgumentError, "'gemma' is known"),
    "core::Config": (config(hidden_size=-1), MqadaptError, "'hidden_size'"),
    "core::PlanSyntax": (plan("mha:all"), ArgumentError, "neither 'keep', 'mqa' nor 'gqaN'"),
    "core::PlanLength": (plan("1, 0"), ArgumentError, "2 entries, but the model has 30"),
    "core::PlanLayer": (plan("mqa:30"), ArgumentError, "layer 30, but the model has layers 0 to 29"),
    "core::PlanHeads": (plan("gqa2:0"), ArgumentError, "1 and 3 are possible"),
    "core::PlanStorage": (
        lambda model, _: mq.Model.load(model, "keep@int8:1", kv="int4"),
        ArgumentError,
        "layer 1 as int8",
    ),
    "checkpoint::Io": (lambda model, _: mq.Plan.parse("absent.json", model), FileNotFoundError, "absent.json"),
    "checkpoint::NotACheckpoint": (lambda _, out: mq.inspect(out), MqadaptError, "config.json"),
    "checkpoint::Config": (config(num_hidden_layers="many"), MqadaptError, "config.json: "),
    "checkpoint::Plan": (lambda model, out: mq.convert(model, out / "x", "mqa:99"), ArgumentError, "layer 99"),
    "checkpoint::Header": (raw(b"\0" * 4), MqadaptError, "not a valid safetensors file"),
    "checkpoint::Index": (index("[]"), MqadaptError, "index.json"),
    "checkpoint::MissingShard": (
        index(json.dumps({"weight_map": {A_KEY: "b.safetensors"}})),
        MqadaptError,
        "names the shard 'b.safetensors', which is not in the folder",
    ),
    "checkpoint::Misplaced": (
        index(json.dumps({"weight_map": {"no.such.tensor": "a.safetensors"}})),
        MqadaptError,
        "tensor '",
    ),
    "checkpoint::MissingTensor": (header(lambda e: e.update({"x": e.pop(A_KEY)})), MqadaptError, f"'{A_KEY}'"),
    "checkpoint::Shape": (header(lambda e: e[A_KEY]["shape"].reverse()), MqadaptError, "but config.json says [24, 72]"),
    "checkpoint::Dtype": (header(lambda e: e[A_KEY].update(dtype="I32")), MqadaptError, "is stored as I32"),
    "checkpoint::Shrunk": "needs a file that shrinks between two reads; tested in Rust",
    "checkpoint::RemoteShard": "needs a hub that fails; tested in test_stream_download.py",
    "checkpoint::NotFinite": "needs values that are not finite; tested in test_damage.py",
    "model::BaseModel": "needs a model without an output projection; tested in test_parity_stored.py",
    "checkpoint::OutOfRange": "a mistake of the calling crate; tested in Rust",
    "checkpoint::Gguf": (
        lambda _, out: ((out / "x.gguf").write_bytes(b"GGUF" + b"\xff" * 100), mq.inspect(out / "x.gguf")),
        MqadaptError,
        "x.gguf",
    ),
    "header::TooShort": (raw(b"1234567"), MqadaptError, "it has 7 bytes"),
    "header::TooLong": (raw(struct.pack("<Q", 1 << 40)), MqadaptError, "the limit is"),
    "header::Truncated": (raw(struct.pack("<Q", 100) + b"{}"), MqadaptError, "only 2 follow"),
    "header::Syntax": (raw(struct.pack("<Q", 2) + b"{]"), MqadaptError, "is malformed"),
    "header::Duplicate": (raw(struct.pack("<Q", len(TWICE)) + TWICE + bytes(8)), MqadaptError, "'a' twice"),
    "header::Overflow": (header(lambda e: e[A_KEY].update(shape=[1 << 40, 1 << 40])), MqadaptError, "overflows"),
    "header::Size": (header(lambda e: e[A_KEY].update(shape=[24, 71])), MqadaptError, "bytes by shape and dtype"),
    "header::NotContiguous": (
        header(lambda e: first(e).update(data_offsets=[4, first(e)["data_offsets"][1] + 4])),
        MqadaptError,
        "starts at offset 4",
    ),
    "header::Length": (
        lambda model, _: (
            (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes() + b"\0"),
            mq.inspect(model),
        ),
        MqadaptError,
        "but the file has",
    ),
    "convert::Checkpoint": (lambda _, out: mq.convert(out, out / "x"), MqadaptError, "config.json"),
    "convert::Io": (convert(dst="../model/config.json/x"), FileExistsError, "cannot create"),
    "convert::Exists": (occupied("config.json"), FileExistsError, "--overwrite"),
    "convert::Unnamed": (
        lambda model, _: mq.convert(model, "", overwrite=True),
        ArgumentError,
        "does not name a folder",
    ),
    "convert::NotReplaceable": (occupied("diary.txt", overwrite=True), ArgumentError, "lists (diary.txt)"),
    "convert::Appeared": (appearing(), FileExistsError, "appeared while the conversion ran"),
    "convert::LeftOver": "needs a folder that gets files between two system calls",
    "convert::Foreign": (
        occupied("diary.txt", folder="out.mqadapt-partial"),
        MqadaptError,
        "(diary.txt); nothing is written",
    ),
    "convert::Journal": "needs a damaged journal; tested in Rust",
    "convert::InPlace": (lambda model, _: mq.convert(model, model, overwrite=True), ArgumentError, "never in place"),
    "convert::Unfinished": (unfinished(), MqadaptError, "--resume continues it"),
    "convert::OtherConversion": (
        unfinished(plan="mqa:0", resume=True),
        MqadaptError,
        "holds another unfinished conversion",
    ),
    "convert::Locked": "needs a second process; tested in Rust",
    "convert::NoSpace": "needs a small disk; tested in Rust",
    "convert::SourceChanged": "needs a source that changes meanwhile; tested in Rust",
    "convert::Overflow": "needs weights beyond float16; tested in Rust",
    "convert::Method": (convert(method="median"), ArgumentError, "'median' is not one of mean, first"),
    "convert::Target": "tested in test_convertible.py",
    "convert::Manifest": "read by verify and resume; tested in Rust",
    "convert::Interrupted": "tested in test_work.py",
    "model::Checkpoint": (lambda _, out: mq.Model.load(out), MqadaptError, "config.json"),
    "model::Config": (lambda model, _: mq.Model.load(model, "gqa2:0"), ArgumentError, "1 and 3 are possible"),
    "calibrate::Io": (
        lambda model, out: mq.convert(
            model, out / "x", "mqa:0", "closed-form", calibration=mq.Calibration([[5] * 40], stats=out / "no" / "stats")
        ),
        FileNotFoundError,
        "stats",
    ),
    "calibrate::Checkpoint": "as model::Checkpoint",
    "calibrate::Model": "as the kinds of model",
    "calibrate::Argument": "tested in test_closed_form.py",
    "calibrate::Merge": "algebra that fails in spite of its jitter; tested in Rust",
    "calibrate::Statistics": "tested in test_closed_form.py",
    "calibrate::Interrupted": "tested in test_work.py",
    "model::NotRunnable": "tested in test_convertible.py",
    "model::Context": "tested in test_gpt.py",
    "model::CalibrationContext": "tested in test_long_context.py",
    "model::Io": "needs a file that fails while it is read",
    "model::Missing": "Checkpoint::open finds missing tensors before",
    "model::Method": (lambda model, _: mq.Model.load(model, "mqa:0", "median"), ArgumentError, "'median'"),
    "model::Token": (run(lambda m: m.logits([1, 49152])), ArgumentError, "49152 is outside the vocabulary"),
    "model::Argument": (run(lambda m: m.perplexity([1, 2, 3], context=1)), ArgumentError, "context"),
    "model::Device": (run(lambda m: m, device="tpu"), ArgumentError, "'tpu'"),
    "model::Storage": (run(lambda m: m, device="cpu-stock", kv="int8"), ArgumentError, "needs device 'cpu'"),
    "model::Cache": (run(lambda m: m.generate([1], max_new_tokens=1 << 50)), MqadaptError, "K/V cache for"),
    "model::Results": "tested in test_arguments.py",
    "model::Weights": "needs a model larger than memory",
    "model::Candle": "needs a device that fails",
    "model::Interrupted": "tested in test_work.py",
}


def variants() -> set[str]:
    """Every variant of the crates' error enums."""
    out = set()
    for crate in ("core", "checkpoint", "calibrate", "convert", "model"):
        name = crate
        for line in (ROOT / "crates" / f"mqadapt-{crate}" / "src" / "error.rs").read_text().splitlines():
            if line.startswith("pub enum "):
                name = "header" if "HeaderProblem" in line else crate
            if match := re.match(r"    ([A-Z]\w+)(?: \{|\(|,)", line):
                out.add(f"{name}::{match[1]}")
    return out


def test_every_kind_is_here() -> None:
    assert set(KINDS) == variants()


@pytest.mark.parametrize("kind", [kind for kind, case in KINDS.items() if not isinstance(case, str)])
def test_kind(kind: str, lookalike: Path, tmp_path: Path) -> None:
    case, expected, message = KINDS[kind]  # type: ignore[misc]
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(lookalike, model)
    out.mkdir()
    before = sorted(path.name for path in model.iterdir())
    with pytest.raises(expected, match=re.escape(message)) as raised:
        case(model, out)
    assert type(raised.value) is expected
    if not kind.startswith("checkpoint::Gguf"):
        assert not (out / "out").exists() or "convert::" in kind
    assert before == sorted(path.name for path in model.iterdir()) or kind.startswith("checkpoint::")


def test_the_hierarchy() -> None:
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(ArgumentError, MqadaptError)
    assert not issubclass(MqadaptError, (OSError, ValueError))


@pytest.mark.parametrize("ids", [[-1], [1.5], ["a"], [1 << 40], 3, None, [[1, 2]]])
def test_token_ids_that_are_none(lookalike: Path, ids: object) -> None:
    with pytest.raises(ArgumentError, match="token ids are"):
        mq.Model.load(lookalike).logits(ids)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [mq.convert, mq.Model.load])
def test_a_dtype_that_is_none(lookalike: Path, tmp_path: Path, call: Callable[..., object]) -> None:
    arguments = [lookalike, tmp_path / "out"] if call is mq.convert else [lookalike]
    with pytest.raises(ArgumentError, match="'int3' is not one of float32, float16, bfloat16"):
        call(*arguments, dtype="int3")
    assert not (tmp_path / "out").exists()
