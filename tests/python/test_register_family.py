"""Checkpoints of an unknown `model_type` that a person knows to be those of a family.

What is registered holds for a whole process, so each case runs in one of its own. The oracle is the same checkpoint under its
right name.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

import tiny
from mqadapt_rs import ArgumentError, MqadaptError, convert, inspect, register_family, verify

WORDS = "a text about nothing, which a tokenizer is trained on. " * 40


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save(tmp_path_factory.mktemp("family") / "known", "llama", vocab_size=320)
    tiny.save_tokenizer(folder, WORDS, vocab_size=320)
    return folder


@pytest.fixture(scope="module")
def unknown(known: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights under another name."""
    folder = tmp_path_factory.mktemp("family") / "unknown"
    folder.mkdir()
    for file in known.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "my_llama", "architectures": ["MyLlamaForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "configuration_my.MyLlamaConfig", "AutoModelForCausalLM": "modeling_my.MyLlama"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mqadapt_rs.cli", *arguments], capture_output=True, text=True, check=False
    )


def printed(*arguments: str) -> dict[str, object]:
    done = run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_without_it_the_error_says_what_to_do(unknown: Path) -> None:
    with pytest.raises(
        MqadaptError, match=r"nearest is 'llama'; supported are .*; --family NAME \(in Python register_family\)"
    ):
        inspect(unknown)


def test_a_conversion_is_one_of_the_family(known: Path, unknown: Path, tmp_path: Path) -> None:
    plan = "mqa:0; gqa2:1"
    convert(known, tmp_path / "expected", plan)
    done = printed("convert", str(unknown), str(tmp_path / "out"), "--plan", plan, "--family", "llama")
    assert done["num_key_value_heads_after"] == [1, 2, 6]
    ours, expected = ({p.name: p for p in (tmp_path / name).iterdir()} for name in ("out", "expected"))
    assert load_file(ours["model.safetensors"]).keys() == load_file(expected["model.safetensors"]).keys()
    assert ours["model.safetensors"].read_bytes() == expected["model.safetensors"].read_bytes()
    assert json.loads(ours["config.json"].read_text()) == json.loads(expected["config.json"].read_text())
    # what is written needs no more insisting
    assert verify(tmp_path / "out").problems == []
    assert tiny.load(tmp_path / "out", trust_remote_code=True).config.model_type == "llama"
    assert run("verify", str(tmp_path / "out"), "--against", str(unknown), "--family", "llama").returncode == 0


def test_every_command_that_opens_a_model_takes_it(known: Path, unknown: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(WORDS)
    measure = ["--text", str(text), "--context", "32", "--windows", "4"]
    commands = {
        "inspect": [],
        "perplexity": measure,
        "generate": ["--prompt", "a text", "--max-new-tokens", "3"],
    }
    for command, options in commands.items():
        own = printed(command, str(unknown), *options, "--family", "llama")
        expected = printed(command, str(known), *options)
        assert {**own, "seconds": 0} == {**expected, "seconds": 0}, command
    bench = ["--depth", "4", "--prompt", "8", "--steps", "1", "--rounds", "1"]
    assert (
        printed("bench", str(unknown), *bench, "--family", "llama")["plans"]
        == printed("bench", str(known), *bench)["plans"]
    )


def test_the_workers_of_a_search_know_it(unknown: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(WORDS)
    options = ["--strategy", "sensitivity", "--text", str(text), "--context", "32", "--windows", "4", "--workers", "2"]
    done = run("search", str(unknown), *options, "--out", str(tmp_path / "out"), "--family", "llama")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("family", "message"),
    [("lama", "family 'lama' does not exist; there are llama,"), ("qwen2", "model_type 'llama' is known")],
)
def test_a_family_that_cannot_be_is_refused(known: Path, family: str, message: str) -> None:
    done = run("inspect", str(known), "--family", family)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_what_is_checked_stays(unknown: Path) -> None:
    done = run("inspect", str(unknown), "--family", "gemma2")
    assert done.returncode == 1
    assert "model.layers.0.pre_feedforward_layernorm.weight" in "".join(done.stderr.split())


def test_in_python(unknown: Path) -> None:
    with pytest.raises(ArgumentError, match="family 'lama' does not exist"):
        register_family("my_llama", "lama")
    with pytest.raises(ArgumentError, match="model_type 'gemma' is known, so it is not read as 'llama'"):
        register_family("gemma", "llama")
    code = (
        "import sys, mqadapt_rs as mq; mq.register_family('my_llama', 'llama'); "
        "print(mq.Model.load(sys.argv[1]).config.model_type, mq.ModelConfig.load(sys.argv[1]).num_key_value_heads)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(unknown)], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=1) == ["llama", "[6, 6, 6]\n"]


def test_lm_eval_takes_it_as_an_argument_of_the_model(unknown: Path) -> None:
    code = (
        "import sys\nfrom lm_eval.api.registry import get_model\nimport mqadapt_rs.lm_eval\n"
        "lm = get_model('mqadapt').create_from_arg_string(f'pretrained={sys.argv[1]},family=llama')\n"
        "print(lm.model.config.model_type)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(unknown)], capture_output=True, text=True, check=False)
    assert done.stdout.split()[-1:] == ["llama"], done.stderr
