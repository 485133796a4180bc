"""Broken sources, illegal plans and bad outputs: one clear message each, and nothing left behind."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from mqadapt_rs import Model, MqadaptError, convert, inspect
from mqadapt_rs import text as texts
from mqadapt_rs.lm_eval import tokenizer as hf_tokenizer
from mqadapt_rs.sources import hub

Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny.save(folder / "one", "llama", num_key_value_heads=6)
    tiny.save(folder / "many", "llama", num_key_value_heads=6, max_shard_size="50KB")
    return folder


def edit_config(**changes: object) -> Break:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        config = {key: value for key, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Break:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def edit_header(change: Callable[[dict[str, object]], object]) -> Break:
    """Rewrites the header of the file, the data unchanged."""

    def apply(folder: Path) -> None:
        raw = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        change(header)
        new = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])

    return apply


def edit_index(change: Callable[[dict[str, str]], object]) -> Break:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        change(index["weight_map"])
        file.write_text(json.dumps(index))

    return apply


def write(name: str, content: bytes) -> Break:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, keep: float) -> Break:
    return lambda folder: os.truncate(folder / name, int((folder / name).stat().st_size * keep))


K = "model.layers.1.self_attn.k_proj.weight"
KEYS = list[str]


def first_shard(weight_map: dict[str, str]) -> str:
    return min(weight_map.values())


# (checkpoint, what breaks it, a word that the message must have)
BROKEN: dict[str, tuple[str, Break, str]] = {
    "no_config": ("one", lambda f: (f / "config.json").unlink(), "config.json"),
    "config_not_json": ("one", write("config.json", b"{"), "config.json"),
    "config_is_a_list": ("one", write("config.json", b"[]"), "config.json"),
    "config_not_utf8": ("one", write("config.json", b"\xff\xfe"), "config.json"),
    "no_model_type": ("one", edit_config(model_type=...), "model_type"),
    "unknown_model_type": ("one", edit_config(model_type="mamba"), "mamba"),
    "no_hidden_size": ("one", edit_config(hidden_size=...), "hidden_size"),
    "zero_heads": ("one", edit_config(num_attention_heads=0), "num_attention_heads"),
    "negative_layers": ("one", edit_config(num_hidden_layers=-1), "num_hidden_layers"),
    "huge_hidden_size": ("one", edit_config(hidden_size=2**62), "hidden_size"),
    "kv_heads_do_not_divide": ("one", edit_config(num_key_value_heads=4), "num_key_value_heads"),
    "unknown_rope": ("one", edit_config(rope_parameters={"rope_type": "proportional", "rope_theta": 1e4}), "rope_type"),
    "unknown_activation": ("one", edit_config(hidden_act="relu6"), "hidden_act"),
    "no_weights": ("one", lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "empty_weights": ("one", write("model.safetensors", b""), "model.safetensors"),
    "short_header_length": ("one", write("model.safetensors", b"\x01\x00"), "model.safetensors"),
    "huge_header_length": ("one", write("model.safetensors", b"\xff" * 8 + b"{}"), "model.safetensors"),
    "header_not_json": ("one", write("model.safetensors", struct.pack("<Q", 4) + b"nope"), "model.safetensors"),
    "truncated_header": ("one", cut("model.safetensors", 0.001), "model.safetensors"),
    "truncated_weights": ("one", cut("model.safetensors", 0.7), "model.safetensors"),
    "bytes_behind_the_end": (
        "one", lambda f: (f / "model.safetensors").open("ab").write(b"x" * 8), "model.safetensors"),
    "missing_tensor": ("one", edit_tensors(lambda t: t.pop(K)), K),
    "wrong_shape": ("one", edit_tensors(lambda t: t.update({K: torch.zeros(40, 48)})), K),
    "transposed": ("one", edit_tensors(lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(48, 80)})),
                   "up_proj"),
    "wrong_dtype": ("one", edit_tensors(lambda t: t.update({K: t[K].to(torch.int32)})), K),
    "offsets_backwards": ("one", edit_header(lambda h: h[K].update(data_offsets=[64, 0])), "model.safetensors"),
    "offsets_outside": ("one", edit_header(lambda h: h[K].update(data_offsets=[0, 2**40])), "model.safetensors"),
    "offsets_do_not_fit_the_shape": ("one", edit_header(lambda h: h[K].update(shape=[47, 48])), K),
    "offsets_overlap": (
        "one", edit_header(lambda h: h[K].update(data_offsets=h["model.norm.weight"]["data_offsets"])), ""),
    "unknown_stored_dtype": ("one", edit_header(lambda h: h[K].update(dtype="F4")), ""),
    "missing_shard": ("many", lambda f: min(f.glob("model-*.safetensors")).unlink(), "model-00001"),
    "shard_not_in_the_index": (
        "many", edit_index(lambda m: [m.pop(k) for k in [k for k, v in m.items() if v == first_shard(m)]]), ""),
    "index_names_a_shard_that_lacks_the_tensor": ("many", edit_index(lambda m: m.update({K: max(m.values())})), K),
    "index_not_json": ("many", write("model.safetensors.index.json", b"{"), "index.json"),
    "index_leaves_the_folder": ("many", edit_index(lambda m: m.update({K: "../one/model.safetensors"})), "index.json"),
    "truncated_shard": ("many", cut("model-00002-of-00005.safetensors", 0.5), "model-00002"),
}  # fmt: skip


@pytest.fixture(params=BROKEN)
def broken(request: pytest.FixtureRequest, checkpoints: Path, tmp_path: Path) -> tuple[Path, str]:
    which, damage, word = BROKEN[request.param]
    folder = tmp_path / "source"
    shutil.copytree(checkpoints / which, folder)
    if request.param == "truncated_shard":
        shard = sorted(folder.glob("model-*.safetensors"))[1]
        damage = cut(shard.name, 0.5)
    damage(folder)
    return folder, word


def assert_readable(error: BaseException, *words: str) -> None:
    message = str(error)
    assert all(word in message for word in words), message
    assert 20 < len(message) < 600 and "Traceback" not in message and "panicked" not in message, message


@pytest.mark.parametrize("plan", ["mqa:0", "keep"])
def test_broken_sources_are_not_converted(broken: tuple[Path, str], plan: str, tmp_path: Path) -> None:
    folder, word = broken
    out = tmp_path / "outputs" / "out"
    out.parent.mkdir()
    with pytest.raises((MqadaptError, OSError)) as caught:
        convert(folder, out, plan=plan)
    assert_readable(caught.value, word)
    assert list(out.parent.iterdir()) == []


def test_broken_sources_are_not_loaded(broken: tuple[Path, str]) -> None:
    folder, word = broken
    with pytest.raises((MqadaptError, OSError)) as caught:
        Model.load(folder)
    assert_readable(caught.value, word)


def change_gguf(at: int, content: bytes) -> Break:
    def apply(path: Path) -> None:
        with path.open("r+b") as file:
            file.seek(at)
            file.write(content)

    return apply


def rename_in_gguf(old: bytes, new: bytes) -> Break:
    """Another name, or a type number behind it, of the same length."""

    def apply(path: Path) -> None:
        raw = path.read_bytes()
        assert raw.count(old) == 1 and len(old) == len(new)
        path.write_bytes(raw.replace(old, new))

    return apply


def cut_gguf(keep: float) -> Break:
    return lambda path: os.truncate(path, int(path.stat().st_size * keep))


SHAPE_OF_K = b"blk.0.attn_k.weight" + struct.pack("<IQQI", 2, 8, 8, 0)

# (what breaks it, a word that the message must have beside the file's name); offsets: 4 version, 8 tensors, 16 keys
BROKEN_GGUF: dict[str, tuple[Break, str]] = {
    "empty": (cut_gguf(0), ""),
    "magic_only": (lambda path: os.truncate(path, 4), ""),
    "other_magic": (change_gguf(0, b"GGML"), ""),
    "other_byte_order": (change_gguf(4, struct.pack(">I", 3)), "big-endian"),
    "future_version": (change_gguf(4, struct.pack("<I", 99)), "99"),
    "tensors_beyond_memory": (change_gguf(8, struct.pack("<Q", 2**60)), ""),
    "keys_beyond_memory": (change_gguf(16, struct.pack("<Q", 2**60)), ""),
    "cut_in_the_keys": (cut_gguf(0.1), ""),
    "cut_in_the_weights": (cut_gguf(0.9), ""),
    "no_such_type": (rename_in_gguf(SHAPE_OF_K, SHAPE_OF_K[:-4] + struct.pack("<I", 4711)), "4711"),
    "wrong_shape": (
        rename_in_gguf(SHAPE_OF_K, SHAPE_OF_K[:-12] + struct.pack("<QI", 4, 0)), "attn_k"),
    "zero_rows": (rename_in_gguf(SHAPE_OF_K, SHAPE_OF_K[:-12] + struct.pack("<QI", 0, 0)), ""),
    "missing_tensor": (rename_in_gguf(b"blk.0.attn_k.weight", b"blk.0.attn_x.weight"), "attn_x"),
    "missing_key": (rename_in_gguf(b"llama.attention.head_count", b"llama.attention.heads_here"), "head_count"),
    "name_not_utf8": (rename_in_gguf(b"blk.0.attn_k.weight", b"blk.0.attn_\xff.weight"), ""),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_GGUF)
def test_broken_gguf(case: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf (extra `test`) is not installed")
    path, out = tmp_path / "tiny.gguf", tmp_path / "out"
    texts = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a"]
    tiny.write_gguf(path, texts, [0.0] * len(texts), [2, 3, 3] + [6] * 256 + [1, 1])
    convert(path, tmp_path / "whole", plan="keep", sync=False)
    damage, word = BROKEN_GGUF[case]
    damage(path)
    for call in (lambda: convert(path, out, plan="keep"), lambda: Model.load(path), lambda: inspect(path)):
        with pytest.raises((MqadaptError, OSError)) as caught:
            call()
        assert_readable(caught.value, "tiny.gguf", word)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tiny.gguf", "whole"]


def test_missing_folder(tmp_path: Path) -> None:
    for call in (
        lambda: convert(tmp_path / "none", tmp_path / "out", plan="mqa:0"),
        lambda: Model.load(tmp_path / "none"),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        assert_readable(caught.value, str(tmp_path / "none"))
    assert not (tmp_path / "out").exists()


ILLEGAL_PLANS = {
    "too_short": ("1, 0", "3"),
    "too_long": ([6, 6, 6, 6], "3"),
    "not_a_divisor": ("gqa4:0", "1, 2, 3 and 6"),
    "zero": ([0, 6, 6], "1, 2, 3 and 6"),
    "more_than_the_source": ("gqa12:0", "1, 2, 3 and 6"),
    "out_of_range": ("mqa:3", "3"),
    "last_too_many": ("mqa:last4", "last4"),
    "backwards": ("mqa:2-1", "2-1"),
    "nonsense": ("half of them", "half of them"),
    "empty": ("", ""),
    "flag_two": ("1, 0, 2", "2"),
    "unknown_kind": ("mha:0", "mha"),
    "no_such_file": ("plan.json", "plan.json"),
}


@pytest.mark.parametrize("case", ILLEGAL_PLANS)
def test_illegal_plans(case: str, checkpoints: Path, tmp_path: Path) -> None:
    plan, word = ILLEGAL_PLANS[case]
    with pytest.raises((MqadaptError, OSError)) as caught:
        convert(checkpoints / "one", tmp_path / "out", plan=plan)
    assert_readable(caught.value, word)
    with pytest.raises((MqadaptError, OSError)):
        Model.load(checkpoints / "one", plan=plan)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value"), [("method", "median"), ("dtype", "int8"), ("dtype", "float64")])
def test_illegal_options(name: str, value: str, checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=value):
        convert(checkpoints / "one", tmp_path / "out", **{"plan": "mqa:0", name: value})
    assert not (tmp_path / "out").exists()


def test_output_that_exists(checkpoints: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    with pytest.raises((MqadaptError, OSError)) as caught:
        convert(checkpoints / "one", out, plan="mqa:0")
    assert_readable(caught.value, str(out))
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


def test_output_that_is_a_file(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises((MqadaptError, OSError)):
        convert(checkpoints / "one", tmp_path / "out", plan="mqa:0")
    assert (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("spelling", ["same", "dotted", "link", "inside"])
def test_output_that_is_the_source(spelling: str, overwrite: bool, checkpoints: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoints / "one", source)
    (tmp_path / "link").symlink_to(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    spellings = {"same": source, "dotted": tmp_path / "source" / ".." / "source", "link": tmp_path / "link"}
    with pytest.raises((MqadaptError, OSError)) as caught:
        convert(source, spellings.get(spelling, source / "model.safetensors"), plan="mqa:0", overwrite=overwrite)
    assert_readable(caught.value)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_output_that_cannot_be_written(checkpoints: Path, tmp_path: Path) -> None:
    # a parent that is a file: this fails for root too, whom permissions do not stop
    (tmp_path / "file").write_text("")
    with pytest.raises((MqadaptError, OSError)) as caught:
        convert(checkpoints / "one", tmp_path / "file" / "out", plan="mqa:0")
    assert_readable(caught.value, "file")
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if not os.access(closed, os.W_OK):
        with pytest.raises(OSError, match="out"):
            convert(checkpoints / "one", closed / "out", plan="mqa:0")
        assert not list(closed.iterdir())


def test_token_ids_outside_the_vocabulary(checkpoints: Path) -> None:
    model = Model.load(checkpoints / "one")
    for call in (
        lambda: model.logits([5, 160]),
        lambda: model.loglikelihood([([5], [160])]),
        lambda: model.generate([160], max_new_tokens=1),
        lambda: model.perplexity([160] * 8, context=4),
    ):
        with pytest.raises(ValueError, match="160"):
            call()
    with pytest.raises(ValueError, match="empty"):
        model.generate([], max_new_tokens=1)
    with pytest.raises(ValueError, match="empty"):
        model.loglikelihood([([], [5])])
    assert model.logits([]).shape == (0, 160)


def test_the_command_line_says_it_in_a_paragraph(checkpoints: Path, tmp_path: Path) -> None:
    def run(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mqadapt_rs.cli", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    done = run("convert", checkpoints / "one", tmp_path / "out", "--plan", "gqa4:0")
    assert done.returncode == 2, done.stderr
    assert "1, 2, 3 and 6" in " ".join(done.stderr.split()) and "Traceback" not in done.stderr
    assert done.stdout == ""
    broken = tmp_path / "broken"
    shutil.copytree(checkpoints / "one", broken)
    cut("model.safetensors", 0.5)(broken)
    done = run("convert", broken, tmp_path / "out", "--plan", "mqa:0")
    assert done.returncode == 1, done.stderr
    assert "model.safetensors" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_missing_text_is_named(checkpoints: Path, tmp_path: Path) -> None:
    told = ["--plan", "mqa:all", "--method", "closed-form", "--calibration", "nofile.txt"]
    command = [sys.executable, "-m", "mqadapt_rs.cli", "convert", str(checkpoints / "one"), "out", *told]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 1
    assert run.stderr == "mqadapt: nofile.txt: No such file or directory\n"
    assert not list(tmp_path.iterdir())


DEEP = b"[" * 100_000
# what a text file holds, its name's ending, and the words that the message must have
TEXTS: dict[str, tuple[str, bytes, str]] = {
    "nested_deeply": (".jsonl", b'{"text": ' + DEEP, "line 1: not JSON: its brackets are nested too deeply"),
    "second_line": (".jsonl", b'{"text": "a"}\n' + DEEP, "line 2: not JSON"),
    "lone_surrogate": (".jsonl", b'{"text": "ab\\ud800c"}', "half of a surrogate pair (\\ud800 at character 2)"),
    "surrogate_in_another_field": (".jsonl", b'{"x\\udfff": 1}', "expected an object with a text in 'text'"),
    "not_a_number": (".jsonl", b'{"text": NaN}', "expected an object with a text in 'text'"),
    "a_number": (".jsonl", b"9" * 5000, "line 1: not JSON"),
    "not_utf8": (".jsonl", b'{"text": "\xff"}', "expected UTF-8 text"),
    "plain_not_utf8": (".txt", b"abc\xff", "expected UTF-8 text"),
    "no_gzip": (".jsonl.gz", b'{"text": "a"}', "not a whole gzip file"),
    "empty_gzip_header": (".jsonl.gz", b"\x1f\x8b", "not a whole gzip file"),
    "gzip_cut_short": (".jsonl.gz", gzip.compress(b'{"text": "abc"}\n' * 5000)[:-100], "not a whole gzip file"),
    "gzip_of_noise": (".jsonl.gz", gzip.compress(b"x")[:10] + bytes(range(256)) * 9, "not a whole gzip file"),
    "gzip_with_another_checksum": (
        ".jsonl.gz", gzip.compress(b'{"text": "abc"}\n')[:-8] + bytes(8), "not a whole gzip file"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_broken_texts(case: str, tmp_path: Path) -> None:
    ending, content, words = TEXTS[case]
    file = tmp_path / f"text{ending}"
    file.write_bytes(content)
    with pytest.raises(MqadaptError) as caught:
        list(texts.read_documents(file))
    assert_readable(caught.value, str(file), words)
    assert not isinstance(caught.value, ValueError)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "model.safetensors.index.json", "config.json", "plan.json"])
@pytest.mark.parametrize(
    "content", [DEEP, b"{" * 100_000, b'{"a":' * 100_000, b"NaN", b'"\\ud800"', b"\xff", b"null", b"9" * 5000]
)
def test_json_that_cannot_be(name: str, content: bytes, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    calls = {
        "tokenizer_config.json": lambda: hf_tokenizer._read(file),
        "model.safetensors.index.json": lambda: hub.weight_files(tmp_path),
        "config.json": lambda: inspect(tmp_path),
        "plan.json": lambda: convert(tmp_path, tmp_path / "out", plan=str(file)),
    }
    try:
        calls[name]()
    except (MqadaptError, OSError) as error:
        assert_readable(error, name)
    else:
        assert name == "tokenizer_config.json" and content in (b"null", b"NaN", b'"\\ud800"')  # counts as none


def test_a_tokenizer_class_that_is_no_name(checkpoints: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": ["a"]}')
    with pytest.raises(MqadaptError, match="cannot load a tokenizer"):
        hf_tokenizer.load_tokenizer(tmp_path)


SEARCH = ["search", "SRC", "--text", "DEEP.jsonl", "--out", "DST", "--strategy"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["perplexity", "SRC", "--text", "DEEP.jsonl"], 1, "line 1: not JSON"),
        (["perplexity", "SRC", "--text", "HALF.jsonl"], 1, "half of a surrogate pair"),
        (["perplexity", "SRC", "--text", "BROKEN.jsonl.gz"], 1, "not a whole gzip file"),
        (["generate", "SRC", "--prompt", "a\udcff"], 2, "half of a surrogate pair (\\udcff at character 1)"),
        (["convert", "SRC", "DST", "--plan", "mqa:\udcff"], 2, "half of a surrogate pair"),
        (["convert", "SRC", "DST", "--seed", "9" * 30], 2, "seed must be a whole number from 0 to 2**64 - 1"),
        (["convert", "SRC", "DST", "--max-memory", "9" * 30 + "GB"], 2, "max_memory must be a whole number"),
        (["convert", "SRC", "DST", "--max-shard-size", "0"], 2, "max_shard_size must be a whole number from 1"),
        (["generate", "SRC", "--prompt", "a", "--max-new-tokens", "99999999999999"], 1, "out of memory while allocating"),
        (["generate", "SRC", "--prompt", "a", "--max-new-tokens", "9" * 40], 2, "max_new_tokens must be"),
        ([*SEARCH, "greedy", "--max-damage", "nan"], 2, "max_damage"),
        ([*SEARCH, "sensitivity", "--workers", "9" * 20], 2, "workers"),
        ([*SEARCH, "sensitivity", "--windows", "9" * 40], 2, "windows"),
    ],
)  # fmt: skip
def test_the_command_line_knows_these_errors(
    arguments: list[str], code: int, words: str, lookalike: Path, tmp_path: Path
) -> None:
    (tmp_path / "DEEP.jsonl").write_bytes(DEEP)
    (tmp_path / "HALF.jsonl").write_bytes(TEXTS["lone_surrogate"][1])
    (tmp_path / "BROKEN.jsonl.gz").write_bytes(TEXTS["gzip_of_noise"][1])
    told = [os.fsencode(str(lookalike) if word == "SRC" else word) for word in arguments]
    command = [sys.executable, "-m", "mqadapt_rs.cli", *told]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == code, done.stderr
    assert words in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert "please report it" not in done.stderr
    assert not (tmp_path / "DST").exists()
