"""`convert --stream-download`: one weight file at a time from a hub that also fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

import mqadapt_rs as mq
import test_gpt
from fake_hub import FakeHub
from mqadapt_rs import ArgumentError
from mqadapt_rs.sources import download as stream

SHARDS = 4


@pytest.fixture(scope="module")
def sharded(lookalike: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lookalike in several files."""
    folder = tmp_path_factory.mktemp("sharded")
    weights = load_file(lookalike / "model.safetensors")
    names = sorted(weights)
    parts = {f"model-{i + 1:05}-of-{SHARDS:05}.safetensors": names[i::SHARDS] for i in range(SHARDS)}
    for file, own in parts.items():
        save_file({name: weights[name] for name in own}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in lookalike.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "DELAY", 0.01)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "mqadapt.json"}


@pytest.fixture(scope="module")
def expected(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What converting the folder itself gives."""
    dst = tmp_path_factory.mktemp("expected") / "out"
    mq.convert(sharded, dst, "mqa:last8")
    return contents(dst)


def stream_convert(tmp_path: Path, **options: Any) -> mq.ConversionReport:
    return mq.convert("org/model", tmp_path / "out", "mqa:last8", stream_download=True, **options)


def shard(number: int) -> str:
    return f"model-{number:05}-of-{SHARDS:05}.safetensors"


def test_gives_the_same_and_keeps_one_file(
    hub: FakeHub, sharded: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    hub.add("org/model", sharded)
    most = 0

    def watch(*_: object) -> None:
        nonlocal most
        there = list((tmp_path / "out.mqadapt-download").glob("*.safetensors"))
        most = max(most, len(there))

    report = stream_convert(tmp_path, progress=watch)
    assert contents(tmp_path / "out") == expected
    assert report.manifest["source"]["name"] == "org/model"
    assert most <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf-home", "out"]
    assert not list((tmp_path / "hf-home").rglob("*.safetensors"))  # no second copy in the cache
    assert mq.verify(tmp_path / "out", sharded).ok


@pytest.mark.parametrize("failure", ["429", "500", "cut", "short", "long", "corrupt"])
def test_survives_failures(
    hub: FakeHub, sharded: Path, expected: dict[str, bytes], tmp_path: Path, failure: Any, capfd: Any
) -> None:
    hub.add("org/model", sharded)
    hub.fail(shard(1), failure)  # the request for its header
    hub.fail(shard(3), failure, failure)
    stream_convert(tmp_path)
    assert contents(tmp_path / "out") == expected


def test_a_cut_connection_is_resumed_where_it_broke(
    hub: FakeHub, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1 << 16)
    hub.add("org/model", sharded)
    shards = stream.Shards("org/model", tmp_path / "out")
    hub.fail(shard(2), "cut")
    hub.requests.clear()
    assert Path(shards.acquire(shard(2))).read_bytes() == (sharded / shard(2)).read_bytes()
    first, second = [request.range for request in hub.requests_of()]
    assert first is None
    assert second is not None
    start = int(second.removeprefix("bytes=").removesuffix("-"))
    assert 0 < start < (sharded / shard(2)).stat().st_size


@pytest.mark.parametrize("failure", ["500", "short", "corrupt"])
def test_a_hub_that_keeps_failing_leaves_nothing(hub: FakeHub, sharded: Path, tmp_path: Path, failure: Any) -> None:
    hub.add("org/model", sharded)
    hub.fail(shard(3), *[failure] * 100)
    with pytest.raises(OSError, match="org/model"):
        stream_convert(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["hf-home"]


def test_resume_goes_on(hub: FakeHub, sharded: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    hub.add("org/model", sharded)
    hub.fail(shard(3), *["corrupt"] * 100)  # its header comes through
    with pytest.raises(OSError, match="org/model"):
        stream_convert(tmp_path, resume=True)
    hub.failures.clear()
    hub.requests.clear()
    stream_convert(tmp_path, resume=True)
    assert contents(tmp_path / "out") == expected
    whole = [r for r in hub.requests_of() if r.path.endswith(shard(1)) and not (r.range or "").startswith("bytes=0-")]
    assert whole == []  # what was converted is not fetched again


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_resume_goes_on_where_heads_are_columns_or_interleaved(hub: FakeHub, family: str, tmp_path: Path) -> None:
    source = test_gpt.save(tmp_path / "source", family, max_shard_size="40KB")
    files = sorted(path.name for path in source.glob("*.safetensors"))
    assert len(files) >= 4
    plan = [6, 2, 1]
    mq.convert(source, tmp_path / "expected", plan)
    hub.add("org/model", source)
    hub.fail(files[-1], *["corrupt"] * 100)
    with pytest.raises(OSError, match="org/model"):
        mq.convert("org/model", tmp_path / "out", plan, stream_download=True, resume=True)
    hub.failures.clear()
    mq.convert("org/model", tmp_path / "out", plan, stream_download=True, resume=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_a_folder_that_is_not_of_downloads_is_left_alone(hub: FakeHub, sharded: Path, tmp_path: Path) -> None:
    hub.add("org/model", sharded)
    scratch, victim = tmp_path / "out.mqadapt-download", tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("years of work")
    scratch.symlink_to(victim)
    with pytest.raises(OSError, match="is a symbolic link"):
        stream_convert(tmp_path)
    scratch.unlink()
    scratch.mkdir()
    (scratch / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match="is not a download folder of mqadapt"):
        stream_convert(tmp_path)
    assert [path.name for path in (*victim.iterdir(), *scratch.iterdir())] == ["thesis.txt", "notes.txt"]
    (scratch / "notes.txt").unlink()
    scratch.rmdir()

    def drop(*_: object) -> None:
        if scratch.exists():
            (scratch / "notes.txt").write_text("mine")

    stream_convert(tmp_path, progress=drop)
    assert [path.name for path in scratch.iterdir()] == ["notes.txt"]


def test_ctrl_c_ends_a_download(hub: FakeHub, sharded: Path, tmp_path: Path) -> None:
    hub.add("org/model", sharded)
    hub.delay = 30.0
    code = "import mqadapt_rs as mq; mq.convert('org/model', 'out', 'mqa:last8', stream_download=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    while not any(r.path.endswith(".safetensors") and r.method == "GET" and not r.range for r in hub.requests):
        time.sleep(0.05)
        assert process.poll() is None, process.stderr
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["hf-home"]


def test_a_local_model_is_refused(sharded: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="is a local path"):
        mq.convert(sharded, tmp_path / "out", stream_download=True)
    assert list(tmp_path.iterdir()) == []


def test_inspect_fetches_headers_only(hub: FakeHub, sharded: Path) -> None:
    hub.add("org/model", sharded)
    assert mq.inspect("org/model") == mq.inspect(sharded)
    weights = [request for request in hub.requests_of() if request.path.endswith(".safetensors")]
    assert len(weights) == SHARDS
    assert all(request.range for request in weights)
    assert not any(stream.hub.fetch_companions(stream.hub.HubId("org/model", None)).glob("*.safetensors"))


def test_inspect_of_what_is_here_asks_for_no_weights(hub: FakeHub, sharded: Path) -> None:
    hub.add("org/model", sharded)
    stream.hub.fetch("org/model")
    hub.requests.clear()
    assert mq.inspect("org/model") == mq.inspect(sharded)
    assert hub.asked_for("GET") == []
