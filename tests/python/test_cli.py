"""The command line: JSON, tables, exit codes, messages, Ctrl-C."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import mqadapt_rs as mq
from mqadapt_rs import text as texts
from mqadapt_rs.cli import output

TEXT = "One day, a little girl named Lily found a needle in her room. She knew it was difficult to play with it. " * 20


def mqadapt(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mqadapt_rs.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


def json_of(*arguments: object) -> Any:
    done = mqadapt(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no progress where nobody looks
    return json.loads(done.stdout)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def test_version_and_help() -> None:
    assert mqadapt("--version").stdout == f"mqadapt {mq.__version__}\n"
    shown = mqadapt("--help").stdout
    for command in ("inspect", "convert", "eval", "lm-eval", "perplexity", "generate", "demo"):
        assert command in shown
        assert mqadapt(command, "--help").returncode == 0


def test_inspect(lookalike: Path) -> None:
    info = json_of("inspect", lookalike)
    heads = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": [3] * 30, "head_dim": 8}
    size = sum(tensor.stat().st_size for tensor in lookalike.glob("*.safetensors"))
    assert {key: info[key] for key in heads} == heads
    assert set(info) == {*heads, "model_type", "parameters", "kv_bytes_per_token", "dtype", "bytes"}
    assert info["model_type"] == "llama"
    assert info["dtype"] == "float32"
    assert info["kv_bytes_per_token"] == 30 * 3 * 8 * 2 * 4
    assert info["bytes"] == 4 * info["parameters"]
    assert 0 < size - info["bytes"] < 100_000  # the header
    assert "0-29: 3" in mqadapt("inspect", lookalike).stdout


def test_convert(lookalike: Path, tmp_path: Path) -> None:
    dst = tmp_path / "out"
    report = json_of("convert", lookalike, dst, "--plan", "mqa:last2", "--method", "first")
    manifest = json.loads((dst / "mqadapt.json").read_text())
    assert {key: report[key] for key in manifest} == manifest
    assert set(report) - set(manifest) == {"bytes_read", "bytes_written", "redone", "seconds", "peak_rss_bytes"}
    assert report["num_key_value_heads_after"] == [3] * 28 + [1] * 2
    assert json_of("inspect", dst)["num_key_value_heads"] == [3] * 28 + [1] * 2
    again = mqadapt("convert", lookalike, dst, "--plan", "mqa:last2")
    assert again.returncode == 1
    assert "exists already" in again.stderr
    shown = mqadapt("convert", lookalike, dst, "--plan", "mqa:last3", "--overwrite").stdout
    assert "0-26: 3, 27-29: 1" in shown


def test_convert_says_why_no_layer_is_merged(lookalike: Path, tmp_path: Path) -> None:
    kept = mqadapt("convert", lookalike, tmp_path / "kept").stdout
    assert "none: every layer keeps its K/V heads" in kept
    mqadapt("convert", lookalike, tmp_path / "mqa", "--plan", "mqa:all")
    again = mqadapt("convert", tmp_path / "mqa", tmp_path / "again", "--plan", "mqa:all").stdout
    assert "nothing to merge: every layer has 1 K/V head" in again


def test_convert_dtype(lookalike: Path, tmp_path: Path) -> None:
    json_of("convert", lookalike, tmp_path / "out", "--dtype", "bfloat16")
    assert json_of("inspect", tmp_path / "out")["dtype"] == "bfloat16"


def test_plan_files(lookalike: Path, tmp_path: Path) -> None:
    heads = [1] + [3] * 29
    for name, content in {
        "p.json": json.dumps({"num_key_value_heads": heads}),
        "p.yaml": f"num_key_value_heads: {heads}",
    }.items():
        (tmp_path / name).write_text(content)
        report = json_of("convert", lookalike, tmp_path / name[2:], "--plan", tmp_path / name)
        assert report["num_key_value_heads_after"] == heads


def test_perplexity_is_that_of_the_definition(lookalike: Path, text: Path) -> None:
    import numpy as np

    result = json_of("perplexity", lookalike, "--text", text, "--context", 64, "--windows", 3)
    assert set(result) == {"perplexity", "tokens", "windows", "context", "seconds"}
    assert (result["tokens"], result["windows"], result["context"]) == (3 * 63, 3, 64)
    ids = texts.token_ids(texts.load_tokenizer(lookalike), TEXT)
    model = mq.Model.load(lookalike)
    losses = []
    for start in range(0, 192, 64):
        window = ids[start : start + 64]
        logits = model.logits(window).astype(np.float64)
        logsum = np.log(np.exp(logits).sum(1))
        losses += [logsum[i] - logits[i, window[i + 1]] for i in range(63)]
    assert result["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)  # f32 sums of 49152 terms
    every = json_of("perplexity", lookalike, "--text", text, "--context", 64)
    assert every["windows"] == len(ids) // 64


def test_perplexity_reads_documents(lookalike: Path, tmp_path: Path, text: Path) -> None:
    expected = json_of("perplexity", lookalike, "--text", text, "--context", 32)["perplexity"]
    lines = [json.dumps({"page": TEXT[:700]}), "", json.dumps({"page": TEXT[700:], "id": 1})]
    plain, packed = tmp_path / "t.jsonl", tmp_path / "t.jsonl.gz"
    plain.write_text("\n".join(lines))
    packed.write_bytes(gzip.compress("\n".join(lines).encode()))
    for file in (plain, packed):
        got = json_of("perplexity", lookalike, "--text", file, "--context", 32, "--field", "page")
        assert got["perplexity"] == expected
    wrong = mqadapt("perplexity", lookalike, "--text", plain)
    assert wrong.returncode == 1
    assert "line 1: expected an object with a text in 'text'" in wrong.stderr


def test_a_plan_in_memory_is_the_converted_checkpoint(lookalike: Path, tmp_path: Path, text: Path) -> None:
    json_of("convert", lookalike, tmp_path / "out", "--plan", "mqa:alternate5", "--method", "mean")
    options = ["--text", text, "--context", 64]
    on_disk = json_of("perplexity", tmp_path / "out", *options)["perplexity"]
    overlay = json_of("perplexity", lookalike, *options, "--plan", "mqa:alternate5", "--method", "mean")["perplexity"]
    source = json_of("perplexity", lookalike, *options)["perplexity"]
    assert on_disk == overlay != source


def test_generate(lookalike: Path) -> None:
    options = ["generate", lookalike, "--prompt", "Once upon", "--max-new-tokens", 6]
    result = json_of(*options)
    assert set(result) == {"prompt", "text", "tokens", "ids", "seconds"}
    tokenizer = texts.load_tokenizer(lookalike)
    model = mq.Model.load(lookalike)
    assert result["ids"] == model.generate(texts.token_ids(tokenizer, "Once upon"), max_new_tokens=6)
    assert mqadapt(*options).stdout == f"Once upon{result['text']}\n"
    warm = [*options, "--temperature", 5.0, "--seed"]
    assert json_of(*warm, 1)["ids"] == json_of(*warm, 1)["ids"] != json_of(*warm, 2)["ids"]


def test_weights(lookalike: Path, text: Path) -> None:
    model = mq.Model.load(lookalike, weights="int8")
    ids = texts.token_ids(texts.load_tokenizer(lookalike), TEXT)
    small = [
        json_of("perplexity", lookalike, "--text", text, "--context", 64, "--weights", w) for w in ("int8", "stored")
    ]
    assert small[0]["perplexity"] == model.perplexity(ids[: len(ids) // 64 * 64], context=64) != small[1]["perplexity"]
    result = json_of("generate", lookalike, "--prompt", "Once upon", "--max-new-tokens", 6, "--weights", "int8")
    assert result["ids"] == model.generate(ids_of(lookalike, "Once upon"), max_new_tokens=6)
    report = json_of("bench", lookalike, "--depth", 4, "--prompt", 8, "--steps", 2, "--rounds", 1, "--weights", "int8")
    assert report["weights"] == "int8"


def test_a_warning_takes_a_line(lookalike: Path, text: Path) -> None:
    merge = ["--plan", "mqa:0", "--method", "closed-form", "--calibration", text, "--calibration-context", 64]
    done = mqadapt("perplexity", lookalike, "--text", text, "--context", 64, "--windows", 1, *merge)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "are few" in line]
    assert line.startswith("mqadapt: ")
    assert ".py" not in done.stderr


def ids_of(src: Path, string: str) -> list[int]:
    return texts.token_ids(texts.load_tokenizer(src), string)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["frobnicate"], 2, "No such command"),
        (["convert"], 2, "Missing argument"),
        (["search", "SRC", "--strategy", "sensitivity", "--text", "no.txt", "--out", "o"], 1, "no.txt: No such file"),
        (["search", "SRC", "--strategy", "sensitivity", "--sequential", "--out", "o"], 2, "has no refit"),
        (["generate", "SRC", "--prompt", "x", "--weights", "int2"], 2, "int2"),
        (["convert", "SRC", "DST", "--plan", "gqa2:0"], 2, "1 and 3 are possible"),
        (["convert", "SRC", "DST", "--plan", "mqa:last99"], 2, "lastN takes N from 1 to 30"),
        (["convert", "SRC", "DST", "--method", "median"], 2, "is not one of mean, first"),
        (["convert", "SRC", "DST", "--dtype", "int3"], 2, "is not one of float32"),
        (["convert", "SRC", "SRC"], 2, "never in place"),
        (["convert", "SRC", "DST", "--plan", "mqa:0", "--sequential"], 2, "need --method closed-form"),
        (["convert", "SRC", "DST", "--plan", "absent.json"], 1, "absent.json"),
        (["convert", "no-such-folder", "DST"], 1, "no such folder or file"),
        (["inspect", "no/such/folder"], 1, "no such folder or file"),
        (["perplexity", "SRC", "--text", "absent.txt"], 2, "does not exist"),
        (["perplexity", "SRC", "--text", "TEXT", "--context", "1"], 2, "--context"),
        (["perplexity", "SRC", "--text", "TEXT", "--context", "64", "--windows", "999"], 2, "999 are needed"),
        (["generate", "SRC", "--prompt", "x", "--temperature", "-1"], 2, "--temperature"),
        (["eval", "SRC", "--tasks", "no_such_task"], 2, "no such task"),
    ],
)
def test_wrong_use(lookalike: Path, tmp_path: Path, text: Path, arguments: list[str], code: int, message: str) -> None:
    names = {"SRC": str(lookalike), "DST": str(tmp_path / "out"), "TEXT": str(text)}
    before = sorted(path.name for path in tmp_path.iterdir())
    done = mqadapt(*[names.get(argument, argument) for argument in arguments])
    assert done.returncode == code, done.stderr
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_debug_shows_the_traceback() -> None:
    for arguments in (["--debug", "inspect", "absent"], ["inspect", "absent", "--debug"]):
        done = mqadapt(*arguments)
        assert done.returncode == 1
        assert "Traceback" in done.stderr


def test_a_model_without_tokenizer(lookalike: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(lookalike / name)
    done = mqadapt("generate", tmp_path, "--prompt", "x")
    assert done.returncode == 1
    assert "has no tokenizer.json" in done.stderr
    (tmp_path / "tokenizer.json").write_text("{}")
    done = mqadapt("generate", tmp_path, "--prompt", "x")
    assert done.returncode == 1
    assert "tokenizer.json" in done.stderr


def test_a_closed_pipe_is_no_error(lookalike: Path) -> None:
    command = f"{sys.executable} -m mqadapt_rs.cli inspect {lookalike} --json | head -c 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["inspect", "SRC"], ["inspect", "SRC", "--json"]])
def test_nobody_reads(lookalike: Path, words: list[str]) -> None:
    """The reader is gone before the first word: no message, and not the exit code of a failure."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "mqadapt_rs.cli", *(str(lookalike) if word == "SRC" else word for word in words)]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_ctrl_c(lookalike: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "mqadapt_rs.cli",
        "generate",
        str(lookalike),
        "--prompt",
        "x",
        "--max-new-tokens",
        "20000",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == []  # noqa: PTH208


def test_eval(lookalike: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "sums.jsonl").write_text(
        "\n".join(json.dumps({"q": f"{a} + 1 =", "choices": [str(a + 1), str(a + 2)], "gold": 0}) for a in range(5))
    )
    (tasks / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{validation: {tasks}/sums.jsonl}}}}\n"
        'output_type: multiple_choice\nvalidation_split: validation\ndoc_to_text: "{{q}}"\n'
        'doc_to_choice: "{{choices}}"\ndoc_to_target: "{{gold}}"\n'
    )
    options = ["eval", lookalike, "--tasks", "sums", "--include-path", tasks, "--limit", 4, "--num-fewshot", 0]
    done = mqadapt(*options, "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert 0 <= results["results"]["sums"]["acc,none"] <= 1
    assert results["n-samples"]["sums"]["effective"] == 4
    table = mqadapt(*options, "--plan", "mqa:all", "--output-path", tmp_path / "out.json")
    assert table.returncode == 0, table.stderr
    assert "sums" in table.stdout
    (written,) = tmp_path.glob("out*.json")  # lm-eval puts the time into the name
    assert json.loads(written.read_text())["results"]["sums"]["acc,none"] >= 0


def test_lm_eval_knows_the_model() -> None:
    pytest.importorskip("lm_eval")
    done = mqadapt("lm-eval", "--help")
    assert done.returncode == 0
    assert "Language Model Evaluation Harness" in done.stdout


def test_every_phase_of_a_progress_bar_has_its_own_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(output, "_DELAY", 0.0)
    with output.progress_bars("bytes") as progress:
        assert progress is not None
        progress("calibrate", 3, 30)
        progress("convert", 5_000_000, 10_000_000)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(r"calibrate .* 3/30 +layers", shown), shown
    assert re.search(r"convert .* 5\.0/10\.0 MB", shown), shown
