"""Files that are none (pipes, devices), that never end or are longer than any real one: refused at once, in little memory."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import tiny
from mqadapt_rs import MqadaptError, convert, files, text

COMMAND = [sys.executable, "-m", "mqadapt_rs.cli"]
PATIENCE = 60
"""Seconds until a command counts as hanging; they take one or two."""
MEMORY = 600 << 20
"""Bytes that no command here comes near to."""

# in a process of its own: what a child held at most is only told of all children together
MEASURE = """
import json, resource, subprocess, sys
done = subprocess.run(sys.argv[2:], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=int(sys.argv[1]))
rss = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
print(json.dumps([done.returncode, done.stdout, done.stderr, rss]))
"""


class Done(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    error: str
    rss: int


def run(*arguments: object, command: list[str] = COMMAND) -> Done:
    measured = [sys.executable, "-c", MEASURE, str(PATIENCE), *command, *map(str, arguments)]
    done = Done(*json.loads(subprocess.check_output(measured, text=True)))
    assert done.rss < MEMORY, (arguments, done.rss)
    return done


def refused(arguments: tuple[object, ...], *words: str, command: list[str] = COMMAND) -> None:
    done = run(*arguments, command=command)
    assert done.code in {1, 2}, done
    message = " ".join(done.error.replace("│", " ").split())
    assert "Traceback" not in message, message
    for word in words:
        assert word in message, message


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("special") / "model"
    vocab_size = tiny.save_tokenizer(folder, WORDS * 40)
    tiny.save(folder, "llama", num_key_value_heads=6, vocab_size=vocab_size)
    (folder.parent / "text.txt").write_text(WORDS * 400)
    return folder


WORDS = "A layer has heads, and heads have keys. Every key has a value; no value is a key. "

PERPLEXITY = ("--context", 16, "--windows", 2)


def pipe(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def endless(path: Path) -> Path:
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")
    return path


SPECIAL = [pytest.param(pipe, "a pipe", id="pipe"), pytest.param(endless, "a device", id="endless")]


@pytest.mark.parametrize(("make", "kind"), SPECIAL)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json"])
def test_files_of_a_checkpoint(make: Callable[[Path], Path], kind: str, name: str, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    if name.endswith(".index.json"):
        (folder / "model.safetensors").unlink()
    make(folder / name)
    refused(("perplexity", folder, "--text", model.parent / "text.txt", *PERPLEXITY), name, kind, "regular file")


@pytest.mark.parametrize(("make", "kind"), SPECIAL)
@pytest.mark.parametrize("ending", [".txt", ".jsonl", ".jsonl.gz"])
def test_texts(make: Callable[[Path], Path], kind: str, ending: str, model: Path, tmp_path: Path) -> None:
    text = make(tmp_path / f"text{ending}")
    refused(("perplexity", model, "--text", text, *PERPLEXITY), text.name, kind, "write the content to a file")
    if ending == ".txt":
        arguments = ("--method", "closed-form", "--calibration", text, "--calibration-context", 16)
        refused(("convert", model, tmp_path / "out", "--plan", "mqa:1", *arguments), text.name, kind)
        search = ("search", model, "--strategy", "sensitivity", "--text", text, "--context", 16)
        refused((*search, "--out", tmp_path / "found"), text.name, kind)


@pytest.mark.parametrize(("make", "kind"), SPECIAL)
def test_other_files_that_are_given(make: Callable[[Path], Path], kind: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused(("inspect", make(tmp_path / "model.gguf")), "model.gguf", kind)
    for ending in ("json", "yaml"):
        refused(("convert", model, out, "--plan", make(tmp_path / f"plan.{ending}")), f"plan.{ending}", kind)
    stats = make(tmp_path / "model.stats")
    refused(
        ("convert", model, out, "--plan", "mqa:1", "--method", "closed-form", "--stats", stats), "model.stats", kind
    )
    journal = tmp_path / "found" / "journal.jsonl"
    journal.parent.mkdir()
    make(journal)
    search = (
        "search",
        model,
        "--strategy",
        "sensitivity",
        "--text",
        model.parent / "text.txt",
        "--context",
        16,
        "--windows",
        2,
        "--out",
        journal.parent,
    )
    refused(
        (*search, "--resume"), "journal.jsonl", "is not a regular file" if kind == "a pipe" else "is a symbolic link"
    )
    refused(("report", journal.parent), "journal.jsonl")
    convert(model, out, "mqa:1")
    make(out / "mqadapt.json")
    refused(("verify", out), "mqadapt.json", kind)


@pytest.mark.parametrize(("make", "kind"), SPECIAL)
@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "chat_template.jinja"]
)
def test_tokenizers_of_transformers(
    make: Callable[[Path], Path], kind: str, name: str, model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    make(folder / name)
    load = "import sys; from mqadapt_rs.lm_eval.tokenizer import load_tokenizer\ntry: load_tokenizer(sys.argv[1])\n"
    load += "except Exception as error: sys.exit(str(error))"
    refused((folder,), name, kind, command=[sys.executable, "-c", load])


def test_a_pipe_of_the_shell_is_refused_with_what_to_do(model: Path) -> None:
    script = f"{' '.join(COMMAND)} perplexity {model} --text <(cat {model.parent / 'text.txt'}) --context 16"
    refused((script,), "expected a regular file, found a pipe", "write the content to a file", command=["bash", "-c"])


def test_a_side_file_of_any_length_takes_no_memory(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    with (folder / "notes.txt").open("wb") as file:
        file.write(b"begin")
        file.truncate(3 << 30)
    run("convert", folder, tmp_path / "out", "--plan", "mqa:1", "--no-sync")
    copy = tmp_path / "out" / "notes.txt"
    with copy.open("rb") as file:
        assert (copy.stat().st_size, file.read(8)) == (3 << 30, b"begin\0\0\0")
    copy.unlink()


def test_a_plan_file_of_megabytes_is_refused(model: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    for content in (b"- " * (15 << 19), b"[" * (15 << 20), b"{}" + b" " * (15 << 20)):
        plan.write_bytes(content)
        refused(("convert", model, tmp_path / "out", "--plan", plan), "plan.yaml", "expected at most 1048576 bytes")
    plan.write_bytes(b"- " * (1 << 19))
    refused(("convert", model, tmp_path / "out", "--plan", plan), "plan.yaml")


def zeros(path: Path, count: int) -> Path:
    """A gzip file of few bytes that holds a line of many."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "')
        for _ in range(count >> 20):
            file.write(b"x" * (1 << 20))
    return path


def test_a_line_that_does_not_end_is_refused(model: Path, tmp_path: Path) -> None:
    bomb = zeros(tmp_path / "bomb.jsonl.gz", 1 << 30)
    refused(("perplexity", model, "--text", bomb, *PERPLEXITY), "bomb.jsonl.gz, line 1", "at most 67108864 characters")


def test_of_a_long_text_only_what_is_needed_is_read(model: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    with long.open("w") as file:
        file.write(WORDS * 400)
        for _ in range(300):
            file.write("another text " * 80_000)
    short = json.loads(run("perplexity", model, "--text", model.parent / "text.txt", *PERPLEXITY, "--json").out)
    found = json.loads(run("perplexity", model, "--text", long, *PERPLEXITY, "--json").out)
    assert found["perplexity"] == short["perplexity"]
    refused(("perplexity", model, "--text", long, "--context", 16), "long.txt", "at most 268435456 characters")


def test_the_beginning_of_a_text_has_the_ids_of_the_whole(model: Path, tmp_path: Path) -> None:
    tokenizer = text.load_tokenizer(model)
    lines = [f"{number}: {WORDS}" for number in range(30_000)]
    (tmp_path / "text.txt").write_text("".join(lines))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for name in ("text.txt", "text.jsonl"):
        whole = text.read_ids(tokenizer, tmp_path / name, "text", None)
        for tokens in (1, 5000, 400_000, len(whole), 2 * len(whole)):
            some = text.read_ids(tokenizer, tmp_path / name, "text", tokens)
            assert some[:tokens] == whole[:tokens]
            assert len(some) < len(whole) or tokens > 300_000


def test_reading_with_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text("[1]")
    assert files.read_json(path, 3) == [1]
    with pytest.raises(MqadaptError, match="expected at most 2 bytes, found more"):
        files.read_json(path, 2)
    path.write_bytes(b"\xff")
    with pytest.raises(MqadaptError, match="not UTF-8"):
        files.read_json(path)
    with pytest.raises(MqadaptError, match="expected a regular file, found a folder"):
        files.read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "none.json")
