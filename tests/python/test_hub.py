"""Sources: local paths and hub ids. The hub is a fake one on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fake_hub import FakeHub
from mqadapt_rs import MqadaptError, Plan
from mqadapt_rs.sources import hub as sources

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "vocab_size": 50,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with more in it than a model needs; the weights are bytes that nothing here reads."""
    out = tmp_path / "repository"
    for name, content in {
        "config.json": json.dumps(CONFIG),
        "tokenizer.json": "{}",
        "tokenizer_config.json": "{ }",
        "chat_template.jinja": "{{ messages }}",
        "LICENSE": "as you like",
        "README.md": "# a model",
        "model.safetensors": "weights" * 1000,
        "consolidated.safetensors": "the same weights",
        "pytorch_model.bin": "the same weights",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        "original/model.safetensors": "the same weights",
        "onnx/config.json": "{}",
        "model.q4.gguf": "the same weights",
    }.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(content)
    return out


def test_fetch_brings_what_is_needed_and_no_more(hub: FakeHub, folder: Path) -> None:
    hub.add("org/model", folder)
    path = sources.fetch("org/model")
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    assert found == {
        "additional_chat_templates/tool_use.jinja",
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
        "README.md",
        "model.safetensors",
    }
    assert (path / "model.safetensors").read_text() == "weights" * 1000


def test_second_fetch_downloads_nothing(hub: FakeHub, folder: Path) -> None:
    hub.add("org/model", folder)
    path = sources.fetch("org/model")
    hub.requests.clear()
    assert sources.fetch("org/model") == path
    assert hub.asked_for("GET") == []


def test_shards_are_those_of_the_index(hub: FakeHub, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors", "unused.safetensors"):
        (folder / name).write_text(name)
    index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.add("org/model", folder)
    path = sources.fetch("org/model")
    assert {file.name for file in path.glob("*.safetensors")} == {"a.safetensors", "b.safetensors"}


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", ".."])
def test_an_index_that_points_outside_is_refused(hub: FakeHub, folder: Path, name: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    hub.add("org/model", folder)
    with pytest.raises(MqadaptError, match="weight_map"):
        sources.fetch("org/model")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"x": 1}}', '{"weight_map": {"x": []}}']
)
def test_a_malformed_index_is_refused(hub: FakeHub, folder: Path, content: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    hub.add("org/model", folder)
    with pytest.raises(MqadaptError, match="weight_map"):
        sources.fetch("org/model")


def test_only_the_configuration(hub: FakeHub, folder: Path) -> None:
    hub.add("org/model", folder)
    assert Plan.parse("mqa:last2", "org/model").num_key_value_heads == [4, 4, 1, 1]
    assert hub.asked_for() == ["config.json"]


def test_only_the_tokenizer(hub: FakeHub, folder: Path) -> None:
    hub.add("org/model", folder)
    sources.fetch_tokenizer("org/model")
    templates = {"chat_template.jinja", "additional_chat_templates/tool_use.jinja"}
    assert set(hub.asked_for()) == {"config.json", "tokenizer.json", "tokenizer_config.json"} | templates


def test_revision(hub: FakeHub, folder: Path) -> None:
    repo = hub.add("org/model", folder, "main", "v2")
    assert sources.fetch_config("org/model@v2").name == repo.revisions["v2"]
    assert sources.fetch_config("org/model").name == repo.revisions["main"]
    with pytest.raises(FileNotFoundError, match="no such revision"):
        sources.fetch("org/model@v3")


def test_token_is_sent(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", folder, gated=True)
    with pytest.raises(PermissionError, match="HF_TOKEN"):
        sources.fetch("org/model")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    sources.fetch("org/model")
    assert {request.token for request in hub.requests[-3:]} == {"Bearer hf_secret"}


def test_no_such_model(hub: FakeHub) -> None:
    with pytest.raises(FileNotFoundError, match="no such model"):
        sources.fetch("org/absent")


def test_no_weights(hub: FakeHub, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    hub.add("org/model", folder)
    with pytest.raises(MqadaptError, match="safetensors"):
        sources.fetch("org/model")


@pytest.mark.parametrize(
    "text",
    [
        "/nowhere/model",
        "./model",
        "../model",
        "~/no-such-model",
        "model",
        "a/b/c",
        "org/model.gguf",
        "model.gguf",
        "org\\model",
        "",
        "org/",
        "/model",
        "org/name with space",
        "here/model",
    ],
)
def test_a_path_never_leads_to_a_request(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        sources.fetch(text)
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        sources.fetch(Path("org/model"))
    assert hub.requests == []


def test_a_local_folder_wins_over_a_hub_id(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert sources.fetch("org/model") == Path("org/model")
    assert hub.requests == []


def test_offline_uses_the_cache_and_says_so_where_it_cannot(hub: FakeHub, folder: Path) -> None:
    hub.add("org/model", folder)
    path = sources.fetch("org/model")
    hub.requests.clear()
    code = "import sys; from mqadapt_rs.sources import hub; print(hub.fetch(sys.argv[1]))"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def run(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, name], env=env, capture_output=True, text=True, check=False)

    assert run("org/model").stdout.strip() == str(path)
    assert "not in the local cache" in run("org/other").stderr
    assert hub.requests == []


def test_a_hub_that_is_away(tmp_path: Path, folder: Path) -> None:
    code = "from mqadapt_rs.sources import hub; hub.fetch('org/model')"
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the hub cannot be reached" in done.stderr.splitlines()[-1]


def test_a_cut_connection_is_resumed(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/model", folder)
    hub.fail("model.safetensors", "cut")
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    path = sources.fetch("org/model")
    assert (path / "model.safetensors").read_text() == "weights" * 1000
    ranges = [r.range for r in hub.requests_of() if r.path.endswith("model.safetensors")]
    assert ranges == [None, "bytes=3000-"]


def test_a_wrong_length_is_an_error(hub: FakeHub, folder: Path) -> None:
    hub.add("org/model", folder)
    hub.fail("model.safetensors", *["short"] * 6)
    with pytest.raises(OSError, match="the download failed"):
        sources.fetch("org/model")
