"""Calibration text from a data set of the hub: which files are read, and what is said where there is none."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import pytest

import tiny
from mqadapt_rs import ArgumentError, Calibration, MqadaptError, load_calibration
from mqadapt_rs.sources import dataset
from mqadapt_rs.sources.hub import HubId

if TYPE_CHECKING:
    from pathlib import Path

    from fake_hub import FakeHub

LINES = [f"the lazy dog number {i} jumps over the quick brown fox" for i in range(400)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    vocab_size = tiny.save_tokenizer(tmp_path / "model", " ".join(LINES))
    tiny.save(tmp_path / "model", "llama", vocab_size=vocab_size)
    return tmp_path / "model"


def write_jsonl(path: Path, lines: list[str], field: str = "text") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "\n".join(json.dumps({field: line, "id": i}) for i, line in enumerate(lines))
    path.write_bytes(gzip.compress(content.encode()) if path.name.endswith(".gz") else content.encode())


def read(name: str, field: str = "text") -> list[str]:
    found = dataset.parse(name)
    assert found is not None
    return list(dataset.documents(found, field))


def test_names() -> None:
    place = HubId("org/some.set", None)
    assert dataset.parse("org/some.set") == (place, None)
    assert dataset.parse("org/some.set@v1:en") == (HubId("org/some.set", "v1"), "en")
    assert dataset.parse("org/set:data/train.jsonl.gz") == (HubId("org/set", None), "data/train.jsonl.gz")
    for path in ("missing.txt", "folder/missing.jsonl", "./org/name", "/missing"):
        assert dataset.parse(path) is None, path


def test_the_training_split_of_one_configuration_is_read(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    write_jsonl(folder / "en/train-00000.jsonl.gz", LINES[:20])
    write_jsonl(folder / "en/train-00001.jsonl", LINES[20:23])
    write_jsonl(folder / "en/validation.jsonl", LINES[30:31])
    write_jsonl(folder / "fr/train.jsonl", ["bonjour"])
    (folder / "README.md").write_text("about", encoding="utf-8")
    hub.add("org/set", folder)
    # the smaller file first
    sizes = [(folder / f"en/train-0000{i}.{s}").stat().st_size for i, s in ((0, "jsonl.gz"), (1, "jsonl"))]
    expected = LINES[:20] + LINES[20:23] if sizes[0] < sizes[1] else LINES[20:23] + LINES[:20]
    assert read("org/set") == expected
    assert "en/validation.jsonl" not in hub.asked_for()
    assert read("org/set:fr") == ["bonjour"]
    assert read("org/set:en/validation.jsonl") == LINES[30:31]


def test_parquet_and_plain_text(hub: FakeHub, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    parquet.write_table(pyarrow.table({"words": LINES[:5], "n": list(range(5))}), folder / "data/a.parquet")
    (folder / "plain").mkdir()
    (folder / "plain/a.txt").write_text("some words", encoding="utf-8")
    hub.add("org/set", folder)
    assert read("org/set:data", "words") == LINES[:5]
    assert read("org/set:plain") == ["some words"]
    with pytest.raises(MqadaptError, match=r"no column 'text' .* found words, n"):
        read("org/set:data")
    with pytest.raises(MqadaptError, match="holds int, expected text"):
        read("org/set:data", "n")


def test_a_calibration_reads_no_more_than_it_needs(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "set"
    write_jsonl(folder / "train-0.jsonl", LINES[:100])
    write_jsonl(folder / "train-1.jsonl", LINES)
    hub.add("org/set", folder)
    with pytest.warns(UserWarning, match="are few"):
        found = load_calibration(model, "org/set", tokens=64, context=32, target_context=[32])
    assert isinstance(found, Calibration)
    assert found.tokens == 64
    assert hub.asked_for() == ["train-0.jsonl"]
    with pytest.warns(UserWarning, match="are few"):
        load_calibration(model, "org/set", tokens=4096, context=32, target_context=[32])
    assert hub.asked_for() == ["train-0.jsonl", "train-1.jsonl"]


def test_what_is_not_there_is_named(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "images.zip").write_bytes(b"PK")
    hub.add("org/set", folder)
    with pytest.raises(FileNotFoundError, match=r"no text .* found images.zip"):
        read("org/set")
    with pytest.raises(FileNotFoundError, match="below 'en'"):
        read("org/set:en")
    with pytest.raises(FileNotFoundError, match="no such data set"):
        read("org/nothing")
    with pytest.raises(FileNotFoundError):
        load_calibration(model, tmp_path / "missing.txt")


def test_a_search_takes_what_a_conversion_takes(hub: FakeHub, tmp_path: Path, model: Path) -> None:
    """Text of a data set, for the merge and for the evaluation; statistics of an earlier command."""
    from typer.testing import CliRunner

    from mqadapt_rs.cli.app import app

    write_jsonl(tmp_path / "set/train.jsonl.gz", LINES, "page")
    hub.add("org/set", tmp_path / "set")

    def run(name: str, *words: object) -> str:
        fixed = ["search", model, "--strategy", "alternate", "--context", 16, "--windows", 4, "--out", tmp_path / name]
        return CliRunner().invoke(app, [*map(str, fixed), *map(str, words)], catch_exceptions=False).output

    drawn = ["--method", "closed-form", "--calibration", "org/set", "--calibration-field", "page"]
    sizes = ["--calibration-tokens", 256, "--calibration-context", "16,32", "--target-context", "16,32"]
    with pytest.warns(UserWarning, match="are few"):
        assert "Winner" in run("a", *drawn, *sizes)
    header = json.loads((tmp_path / "a/journal.jsonl").read_text().splitlines()[0])
    assert header["calibration"] == "256 tokens of org/set in windows of 16, 32, target context 16, 32"
    assert "(org/set, windows of 16 tokens)" in header["text"]
    command = json.loads((tmp_path / "a/summary.json").read_text())["command"]
    assert "--calibration org/set --calibration-field page" in command
    assert "--calibration-context 16,32 --target-context 16,32" in command
    # and the statistics alone are enough, on another text
    saved = ["--method", "closed-form", "--stats", tmp_path / "a/statistics.safetensors", "--target-context", "16,32"]
    assert "Winner" in run("b", *saved, "--text", "org/set:train.jsonl.gz", "--field", "page")
    values = [
        [json.loads(line)["losses"] for line in (tmp_path / name / "journal.jsonl").read_text().splitlines()[1:]]
        for name in ("a", "b")
    ]
    assert values[0] == values[1]
    with pytest.raises(ArgumentError, match="the method mean has no refit"):
        run("c", "--sequential")
    assert not (tmp_path / "c").exists()
    with pytest.raises(ArgumentError, match="target-context"):
        run("d", "--method", "closed-form", "--calibration", "org/set", "--target-context", "long")
