"""Names from outside reach no terminal with their control characters, are no markup, and are shortened; JSON stays exact."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mqadapt_rs as mq
from mqadapt_rs import MqadaptError
from mqadapt_rs.readable import as_code_block, as_html, as_markdown, as_shell, for_json, for_terminal, readable

ESCAPE = "\x1b]0;owned\x07\x1b[31m"
BIDI = "\u202egnp.exe"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]")


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "mqadapt_rs.cli", *map(os.fsencode, map(str, arguments))]
    return subprocess.run(command, capture_output=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def on_terminal(*arguments: object) -> tuple[str, int]:
    """What a terminal gets on stdout, and the exit code."""
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "mqadapt_rs.cli", *map(str, arguments)]
    environment = {**os.environ, "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    seen = b""
    try:
        while block := os.read(ours, 1 << 16):
            seen += block
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return seen.decode().replace("\r\n", "\n"), process.wait()


@pytest.fixture
def model(lookalike: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in lookalike.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def edit_config(folder: Path, **fields: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**content, **fields}))


def rename_tensor(folder: Path, name: str) -> None:
    """Gives a tensor another name in the header."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    entries = json.loads(raw[8 : 8 + length])
    entries[name] = {**entries.pop("model.layers.0.self_attn.k_proj.weight"), "dtype": "I32"}
    text = json.dumps(entries).encode()
    file.unlink()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def test_messages_are_one_line_without_control_characters() -> None:
    assert readable(f"{ESCAPE}a\r\nb\t\x9b{BIDI}\ud800") == (r"\x1b]0;owned\x07\x1b[31ma\r\nb\t\x9b\u202egnp.exe\ud800")
    for text in ("", "größe 🦙 日本語 e\u0301 [24, 72]", "a 'b' `c`", "/" + "/".join(["d" * 255] * 3)):
        assert readable(text) == text
    long = readable(f"tensor '{'x' * (1 << 20)}' is stored as I32; supported are F32")
    assert len(long) < 300 and long.endswith("' is stored as I32; supported are F32") and long.startswith("tensor 'xxx")
    assert len(readable("\x1b " * (1 << 20))) < 1300
    assert readable(readable("\x1b " * 4000)) == readable("\x1b " * 4000)


def test_text_of_a_model_keeps_its_lines_and_letters() -> None:
    assert for_terminal(f"a\n\tb{ESCAPE}\r\x9b क्\u200dष 👩\u200d👧") == (
        "a\n\tb\\x1b]0;owned\\x07\\x1b[31m\\r\\x9b क्\u200dष 👩\u200d👧"
    )


def test_json_is_exact_and_obeyed_by_no_terminal() -> None:
    content = {"a\x9b": f"{ESCAPE}{BIDI}\x7f\udcff\U000e0041 größe 🦙\n"}
    document = for_json(json.dumps(content, indent=2, ensure_ascii=False))
    assert json.loads(document) == content
    assert not OBEYED.search(document)
    assert "größe 🦙" in document


def test_pages() -> None:
    attack = "<script>alert(1)</script>|`x`*y*[z](http://w)~~$\n# title\x1b"
    assert "<" not in as_html(attack) and "\n" not in as_html(attack)
    assert as_markdown(attack) == (
        r"&lt;script&gt;alert(1)&lt;/script&gt;\|\`x\`\*y\*\[z\](http://w)\~\~\$\\n# title\\x1b"
    )
    assert as_code_block("mqadapt search 'a b' --out c") == "```sh\nmqadapt search 'a b' --out c\n```"
    assert as_code_block("mqadapt '<script>'\n```") == "<pre><code>mqadapt '&lt;script&gt;'\n```</code></pre>"


def test_a_command_line_can_be_pasted() -> None:
    words = ["plain", "two words", "it's", "\x1b[31m \\ '\n", "g\u202er", "\udcff", "größe"]
    spelled = as_shell(words)
    assert not OBEYED.search(spelled)
    told = subprocess.run(["bash", "-c", f"printf '%s\\0' {spelled}"], capture_output=True, check=True).stdout
    assert told == b"".join(os.fsencode(word) + b"\0" for word in words)


@pytest.mark.parametrize("name", [ESCAPE, "a\nmqadapt: all is well\n", BIDI, "x" * (1 << 20), "[red]x[/red]", "\x9b2J"])
def test_names_in_files(name: str, model: Path, tmp_path: Path) -> None:
    edit_config(model, model_type=name)
    with pytest.raises(MqadaptError, match="is unknown; the nearest is") as raised:
        mq.inspect(model)
    assert readable(name)[:120] in str(raised.value)
    assert str(raised.value).isprintable() and len(str(raised.value)) < 600
    done = run("inspect", model)
    assert done.returncode == 1
    assert not OBEYED.search(done.stderr.decode()) and done.stderr.count(b"\n") == 1 and len(done.stderr) < 700
    edit_config(model, model_type="llama")
    rename_tensor(model, f"model.{name}")
    for arguments in (["inspect", model], ["convert", model, tmp_path / "out"], ["inspect", model, "--debug"]):
        done = run(*arguments)
        assert done.returncode == 1
        assert not OBEYED.search(done.stderr.decode())
        assert len(done.stderr) < (700 if "--debug" not in arguments else 20_000)


def test_names_of_files(lookalike: Path, tmp_path: Path) -> None:
    place = tmp_path / f"[red]:smile: {ESCAPE}{BIDI}"
    place.symlink_to(lookalike)
    for arguments in (["inspect", place], ["convert", place, f"{place}-out", "--plan", "mqa:0"]):
        seen, code = on_terminal(*arguments)
        assert code == 0
        assert not OBEYED.search(seen.replace("\x1b[?25h", "")), seen
        together = "".join(seen.split())  # a table folds
        assert "[red]:smile:" in together and r"\x1b]0;owned\x07\x1b[31m\u202egnp.exe" in together
    info = run("inspect", place, "--json")
    assert json.loads(info.stdout) == mq.inspect(lookalike)
    report = run("convert", place, f"{place}-out", "--overwrite", "--json")
    assert report.returncode == 0, report.stderr
    assert not OBEYED.search(report.stdout.decode())
    assert json.dumps(json.loads(report.stdout)["source"]).count(json.dumps(place.name)[1:-1])
    bytes_name = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe")
    Path(bytes_name).symlink_to(lookalike)
    done = run("inspect", bytes_name)
    assert done.returncode == 0 and "\\udcff\\udcfe" in "".join(done.stdout.decode().split())
    assert run("convert", bytes_name, f"{bytes_name}-out", "--plan", "mqa:0").returncode == 0


def wrong_words() -> Iterator[list[str]]:
    for word in (f"{ESCAPE}{BIDI}[red]\udcff", "x" * 100_000):
        yield [word]
        yield ["inspect", word]
        yield ["inspect", "SRC", word]
        yield ["inspect", "SRC", f"--{word}"]
        yield ["convert", "SRC", "DST", "--plan", word]
        yield ["convert", "SRC", "DST", "--method", word]
        yield ["convert", "SRC", "DST", "--max-memory", word]
        yield ["perplexity", "SRC", "--text", word]
        yield ["generate", "SRC", "--prompt", "x", "--dtype", word]
        yield ["bench", "SRC", "--depth", word]
        yield ["search", "SRC", "--strategy", word, "--text", "TEXT", "--out", "DST"]
        yield [
            "search",
            "SRC",
            "--strategy",
            "sensitivity",
            "--metric",
            f"task:{word}",
            "--text",
            "TEXT",
            "--out",
            "DST",
        ]


def test_words_of_the_command_line(lookalike: Path, tmp_path: Path) -> None:
    """In one process: each of them would take a second to start."""
    names = {"SRC": str(lookalike), "DST": str(tmp_path / "out"), "TEXT": str(lookalike / "config.json")}
    cases = [[names.get(word, word) for word in words] for words in wrong_words()]
    script = """
import sys, io, json
from mqadapt_rs.cli import main
from mqadapt_rs.cli import options
for words in json.loads(sys.stdin.read()):
    sys.argv = ["mqadapt", *words]
    sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
    try:
        main()
        code = 0
    except SystemExit as end:
        code = end.code
    print(json.dumps([code, sys.stdout.getvalue(), sys.stderr.getvalue()]), file=sys.__stdout__)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(cases), capture_output=True, text=True, check=True, timeout=300
    )
    for words, line in zip(cases, done.stdout.splitlines(), strict=True):
        code, out, errors = json.loads(line)
        assert code in (1, 2), (words, out, errors)
        assert not OBEYED.search(errors) and not OBEYED.search(out), (words, errors)
        assert "\udcff" not in errors and len(errors) < 3000, (words, errors)
        assert "please report it" not in errors and "Traceback" not in errors, (words, errors)


def test_generated_text(lookalike: Path) -> None:
    options = ["generate", lookalike, "--prompt", f"Once\n\tupon {ESCAPE}", "--max-new-tokens", 2]
    piped = run(*options)
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout.decode().startswith(f"Once\n\tupon {ESCAPE}")
    seen, code = on_terminal(*options)
    assert code == 0
    assert not OBEYED.search(seen), seen
    assert seen.startswith(("Once\n\tupon \\x1b]0;owned\\x07\\x1b[31m", "Once\n        upon \\x1b]0;"))
    told = json.loads(run(*options, "--json").stdout)
    assert told["prompt"] == f"Once\n\tupon {ESCAPE}"


def test_an_ascii_terminal_gets_all_it_can(lookalike: Path, tmp_path: Path) -> None:
    place = tmp_path / "größe"
    place.symlink_to(lookalike)
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run("inspect", place, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(run("inspect", place, "--json", env=environment).stdout)["num_hidden_layers"] == 30
    assert run("generate", place, "--prompt", "größe", "--max-new-tokens", 2, env=environment).returncode == 0


def test_problems_of_a_verification(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mq.convert(model, out, "mqa:0", sync=False)
    manifest = json.loads((out / "mqadapt.json").read_text())
    text = json.dumps(manifest).replace("model.safetensors", json.dumps(f"{ESCAPE}.safetensors")[1:-1])
    (out / "mqadapt.json").write_text(text)
    done = run("verify", out)
    assert done.returncode == 1
    assert not OBEYED.search(done.stdout.decode()) and not OBEYED.search(done.stderr.decode())


def test_a_warning_has_no_control_characters(lookalike: Path, tmp_path: Path) -> None:
    script = f"""
import warnings
from mqadapt_rs.cli.entry_point import _in_a_line
print(_in_a_line({ESCAPE!r} + "\\n", UserWarning), end="")
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told == "mqadapt: \\x1b]0;owned\\x07\\x1b[31m\\n\n"
    shutil.rmtree(tmp_path)
