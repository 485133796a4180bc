"""Converted folders in transformers: what they load with, what they refuse, and that they compute what we compute.

Tolerance: as in `test_parity_families.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from transformers import AutoModel, AutoModelForCausalLM

import mqadapt_rs
import tiny
from models import cache_folder
from mqadapt_rs import Model, convert
from test_parity_families import assert_close

MIXED = [6, 2, 1]
IDS = tiny.ids(40)


def trusted(folder: Path, **kwargs: Any) -> Any:
    return tiny.load(folder, trust_remote_code=True, **kwargs)


@pytest.fixture
def mixed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    window = {"sliding_window": 9} if request.param == "mistral" else {}
    source = tiny.save(tmp_path / "source", request.param, **window)
    convert(source, tmp_path / "mixed", plan=MIXED)
    return tmp_path / "mixed"


def kv_heads(attention: torch.nn.Module) -> int:
    """K/V heads of 8 values, by the rows of the projection; 6 query heads."""
    if hasattr(attention, "qkv_proj"):
        return (attention.qkv_proj.out_features // 8 - 6) // 2
    return int(attention.k_proj.out_features) // 8


def kv_gradient(attention: torch.nn.Module) -> float:
    """Size of the gradient of the weights that make keys and values."""
    if hasattr(attention, "qkv_proj"):
        return float(attention.qkv_proj.weight.grad[6 * 8 :].abs().sum())
    return float(attention.k_proj.weight.grad.abs().sum())


every_family = pytest.mark.parametrize("mixed", tiny.FAMILIES, indirect=True)


@every_family
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_layers_that_differ(mixed: Path, attention: str) -> None:
    ours = Model.load(mixed)
    if attention == "sdpa" and ours.config.model_type == "gemma2":
        pytest.skip("transformers' sdpa knows no soft-capping of logits")
    model = trusted(mixed, attn_implementation=attention)
    assert [kv_heads(layer.self_attn) for layer in model.model.layers] == MIXED
    assert_close(ours.logits(IDS), tiny.logits(model, IDS), attention)
    if ours.config.model_type == "gemma2":
        return
    model.set_attn_implementation({"eager": "sdpa", "sdpa": "eager"}[attention])
    assert_close(ours.logits(IDS), tiny.logits(model, IDS), "after set_attn_implementation")


@every_family
def test_the_written_file_is_the_one_of_the_package(mixed: Path) -> None:
    package = Path(mqadapt_rs.__file__).parent
    described = json.loads((mixed / "config.json").read_text())
    family = described["architectures"][0].removeprefix("LayerwiseKV").removesuffix("ForCausalLM")
    expected = (package / "modeling" / "modeling_mqadapt.py").read_text()
    expected = expected.replace("LlamaModel", tiny.base_class(described["model_type"])).replace("Llama", family)
    assert (mixed / "modeling_mqadapt.py").read_text() == expected


@every_family
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(mixed: Path, cache: str) -> None:
    wanted = Model.load(mixed).generate(IDS[:10], max_new_tokens=30, stop_tokens=[])
    options = {} if cache == "dynamic" else {"cache_implementation": "static"}
    prompt = torch.tensor([IDS[:10]])
    options |= {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0}
    out = trusted(mixed).generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert out[0, 10:].tolist() == wanted


@every_family
def test_left_padding(mixed: Path) -> None:
    model = trusted(mixed)
    padded = torch.tensor([[0, 0, 0, *IDS]])
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(padded, attention_mask=mask, position_ids=positions).logits[0, 3:].numpy()
    assert_close(Model.load(mixed).logits(IDS), logits, "logits")


@every_family
def test_save_and_load_again(mixed: Path, tmp_path: Path) -> None:
    model = trusted(mixed)
    model.save_pretrained(tmp_path / "again")
    again = trusted(tmp_path / "again")
    np.testing.assert_array_equal(tiny.logits(again, IDS), tiny.logits(model, IDS))
    # and what transformers writes is a source for us
    ours = Model.load(tmp_path / "again")
    assert ours.config.num_key_value_heads == MIXED
    np.testing.assert_array_equal(ours.logits(IDS), Model.load(mixed).logits(IDS))


@every_family
def test_refused_without_remote_code(mixed: Path) -> None:
    with pytest.raises(Exception, match=r"num_key_value_heads|size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(mixed, trust_remote_code=False)


@every_family
def test_a_training_step(mixed: Path) -> None:
    model = trusted(mixed).train()
    tokens = torch.tensor([IDS])
    before = model(tokens, labels=tokens).loss
    before.backward()
    assert all(kv_gradient(layer.self_attn) > 0 for layer in model.model.layers)
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    assert model(tokens, labels=tokens).loss < before


def test_auto_model(tmp_path: Path) -> None:
    convert(tiny.save(tmp_path / "source", "llama"), tmp_path / "mixed", plan=MIXED)
    assert AutoModel.from_pretrained(tmp_path / "mixed", trust_remote_code=True).config.num_hidden_layers == 3


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("heads", [1, 3])
def test_layers_alike_need_no_remote_code(family: str, heads: int, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", family)
    convert(source, tmp_path / "alike", plan=[heads] * 3)
    written = json.loads((tmp_path / "alike" / "config.json").read_text())
    assert written["num_key_value_heads"] == heads
    assert "per_layer_config" not in written and "auto_map" not in written
    assert not list((tmp_path / "alike").glob("*.py"))
    model = tiny.load(tmp_path / "alike")
    assert_close(Model.load(tmp_path / "alike").logits(IDS), tiny.logits(model, IDS), "logits")


def test_alike_again_after_differing(tmp_path: Path) -> None:
    """Layers that differed and then are alike: an ordinary checkpoint again, without our file."""
    convert(tiny.save(tmp_path / "source", "llama"), tmp_path / "mixed", plan=MIXED)
    convert(tmp_path / "mixed", tmp_path / "alike", plan="mqa:all")
    written = json.loads((tmp_path / "alike" / "config.json").read_text())
    assert "per_layer_config" not in written and "auto_map" not in written
    assert not list((tmp_path / "alike").glob("*.py"))
    assert_close(Model.load(tmp_path / "alike").logits(IDS), tiny.logits(tiny.load(tmp_path / "alike"), IDS), "logits")


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 2.0}], ids=str)
def test_rope_is_written_for_old_and_new_readers(scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama", rope_theta=54321.0, rope_scaling=scaling)
    convert(source, tmp_path / "out", plan="mqa:0")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 54321.0
    assert (written["rope_scaling"] or {}).get("factor") == (scaling or {}).get("factor")


@pytest.fixture(scope="session")
def transformers_457() -> Path:
    """A folder with transformers 4.57, the last of 4.x, to be put first on the path; fetched by pip once."""
    folder = cache_folder() / "transformers-4.57.3"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            packages = ["transformers==4.57.3", "huggingface-hub==0.36.2", "tokenizers==0.22.2"]
            command = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--target",
                f"{folder}.part",
                *packages,
            ]
            subprocess.run(command, check=True, timeout=250)
            Path(f"{folder}.part").rename(folder)
    return folder


@pytest.mark.slow
def test_transformers_457(transformers_457: Path, tmp_path: Path) -> None:
    folders = []
    for family in tiny.FAMILIES:
        source = tiny.save(tmp_path / family, family)
        # layers alike are written as an ordinary checkpoint: one family tells
        for plan in (MIXED, [3, 3, 3]) if family in ("llama", "gemma3_text") else (MIXED,):
            folder = tmp_path / f"{family}{plan[0]}"
            convert(source, folder, plan=plan)
            ours = Model.load(folder)
            new = ours.generate(IDS, max_new_tokens=20, stop_tokens=[])
            np.savez(folder / "expected.npz", ids=np.array(IDS), logits=ours.logits(IDS), new=np.array(new))
            folders.append(str(folder))
    program = Path(__file__).parent / "old_transformers.py"
    path = os.pathsep.join([str(transformers_457), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, str(program), *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"passed {len(tiny.FAMILIES) + 2}" in done.stdout
