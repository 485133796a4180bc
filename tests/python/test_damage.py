"""Models with values that are not finite, and records that were damaged after they were written: noticed, and said where."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import tiny
from mqadapt_rs import Model, MqadaptError, convert, load_calibration, verify
from mqadapt_rs.search import Options, conduct
from mqadapt_rs.search.core.journal import JournalError, read
from search_fakes import SPACE, FakeSpec

# the texts here are short on purpose
pytestmark = pytest.mark.filterwarnings("ignore:.*tokens of calibration text are few")

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
WORDS = "A layer has heads, and heads have keys. Every key has a value; no value is a key. "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "model"
    vocab_size = tiny.save_tokenizer(folder, WORDS * 40)
    tiny.save(folder, "llama", num_key_value_heads=6, vocab_size=vocab_size)
    (folder.parent / "text.txt").write_text(WORDS * 400)
    return folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mqadapt_rs.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def with_value(model: Path, folder: Path, name: str, value: float) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].flat[tensors[name].size // 2] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("method", ["mean", "first", "random", "closed-form", "prune"])
def test_heads_that_are_not_finite_are_not_merged(method: str, value: float, model: Path, tmp_path: Path) -> None:
    broken, text = with_value(model, tmp_path / "broken", K_PROJ, value), model.parent / "text.txt"
    said = "NaN" if np.isnan(value) else "-inf"
    calibrated = {}
    if method in {"closed-form", "prune"}:
        calibrated["calibration"] = load_calibration(broken, text, tokens=600, context=60, target_context=[30])
    for dtype in (None, "bfloat16"):
        with pytest.raises(MqadaptError, match=f"tensor '{K_PROJ}' holds {said} at .*layer 1"):
            convert(broken, tmp_path / "out", "mqa:1", method, dtype=dtype, **calibrated)
        assert not (tmp_path / "out").exists()
    with pytest.raises(MqadaptError, match=f"tensor '{K_PROJ}'"):
        Model.load(broken, plan="mqa:1", method=method, **calibrated)


def test_tensors_that_are_only_copied_pass_with_a_warning(model: Path, tmp_path: Path) -> None:
    broken = with_value(model, tmp_path / "broken", K_PROJ, np.inf)
    for name, dtype in (("stored", None), ("cast", "bfloat16")):
        with pytest.warns(UserWarning, match=f"tensor '{K_PROJ}' holds 1 values that are infinite or NaN"):
            report = convert(broken, tmp_path / name, "mqa:0", dtype=dtype)
        assert report.not_finite == report.to_dict()["not_finite"] == {K_PROJ: 1}
        assert not verify(tmp_path / name).ok
    done = run("convert", str(broken), str(tmp_path / "cli"), "--plan", "mqa:0")
    assert done.returncode == 0
    assert "infinite or NaN" in done.stderr


def test_statistics_are_of_one_model_and_of_no_other(model: Path, tmp_path: Path) -> None:
    stats, text = tmp_path / "model.stats", model.parent / "text.txt"
    calibration = load_calibration(model, text, tokens=600, context=60, target_context=[30], stats=stats)
    convert(model, tmp_path / "out", "mqa:1", "closed-form", calibration=calibration)
    saved = load_calibration(model, None, stats=stats, target_context=[30])
    for tensor, taken in (("model.layers.0.mlp.up_proj.weight", False), ("model.layers.2.mlp.up_proj.weight", True)):
        other = with_value(model, tmp_path / str(taken), tensor, 0.01)
        if taken:
            convert(other, tmp_path / "other", "mqa:1", "closed-form", calibration=saved)
        else:
            with pytest.raises(
                MqadaptError, match=r"model\.stats.*whose layer 0 has other weights.*collect them again"
            ):
                convert(other, tmp_path / "other", "mqa:1", "closed-form", calibration=saved)
    content = bytearray(stats.read_bytes())
    content[-1000] ^= 4
    stats.write_bytes(content)
    with pytest.raises(MqadaptError, match="the file is damaged: collect them again"):
        convert(model, tmp_path / "last", "mqa:2", "closed-form", calibration=saved)


def test_a_manifest_of_an_unknown_method_does_not_pass(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "out", "mqa:1")
    path = tmp_path / "out" / "mqadapt.json"
    path.write_text(path.read_text().replace('"method": "mean"', '"method": "mode"'))
    done = run("verify", str(tmp_path / "out"), "--against", str(model))
    assert done.returncode == 1
    assert "mode" in done.stderr + done.stdout


def test_a_changed_digit_in_a_journal_is_noticed(tmp_path: Path) -> None:
    spec, options = FakeSpec("interacting", documents=48, noise=0.3), Options()
    conduct(spec, SPACE, "sensitivity", options, tmp_path / "whole")
    lines = (tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    for number, field in ((1, "documents"), (2, "losses"), (len(lines), "losses"), (3, "plan"), (3, "stopped")):
        folder = tmp_path / f"{number}{field}"
        folder.mkdir()
        line = json.loads(lines[number - 1])
        match line[field]:
            case [*values]:
                line[field] = [values[0] - 1, *values[1:]] if field == "losses" else [values[0] % 4 + 1, *values[1:]]
            case bool(value):
                line[field] = not value
            case value:
                line[field] = value + 1
        changed = [*lines[: number - 1], json.dumps(line).encode() + b"\n", *lines[number:]]
        (folder / "journal.jsonl").write_bytes(b"".join(changed))
        if number == 1:  # nothing is known without the header
            for call in (read, lambda folder: conduct(spec, SPACE, "sensitivity", options, folder, resume=True)):
                with pytest.raises(JournalError, match="line 1: damaged"):
                    call(folder)
            continue
        with pytest.warns(UserWarning, match=f"line {number}: damaged"):
            assert len(read(folder)[1]) == number - 2
        with pytest.warns(UserWarning, match=f"line {number}: damaged"):
            conduct(spec, SPACE, "sensitivity", options, folder, resume=True)
        again = read(folder)[1]
        assert [record["losses"] for record in again] == [json.loads(line)["losses"] for line in lines[1:]]
