"""GGUF files of every architecture: tensors and configuration are those of the model that the file was made from, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mqadapt_rs
import test_gpt
import tiny

gguf = pytest.importorskip("gguf", reason="the package gguf (extra `test`) is not installed")

import gguf_files  # noqa: E402 - needs the package

# rows of whole blocks of 256 values
SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.05, 1.1, 1.18, 1.2, 1.35, 1.5, 1.77, 1.9, 2.0, 2.3, 2.7],
    "long_factor": [1.0, 1.5, 2.1, 3.3, 4.9, 6.25, 8.0, 12.5, 20.0, 33.3, 48.7, 64.1],
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
# its layers with a window are the default of the family, not that of `tiny`
GEMMA3 = {"sliding_window": 64, "query_pre_attn_scalar": 32, "layer_types": None}
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-linear-untied": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen2": ("qwen2", {"rope_theta": 1_000_000.0}),
    "qwen3": ("qwen3", {"rope_theta": 1_000_000.0, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"num_key_value_heads": 1}),
    "gemma2": ("gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 32, "num_hidden_layers": 3}),
    "gemma2-27b": ("gemma2", {**SMALL, "query_pre_attn_scalar": 16, "num_hidden_layers": 46}),
    "gemma3": ("gemma3_text", {**GEMMA3, "num_hidden_layers": 7, "rope_local_base_freq": 100.0}),
    "gemma3-27b": (
        "gemma3_text",
        {**GEMMA3, **SMALL, "query_pre_attn_scalar": 16, "num_hidden_layers": 62, "rope_parameters": GEMMA3_ROPE},
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3-longrope": (
        "phi3",
        {
            "rope_parameters": LONG_ROPE,
            "max_position_embeddings": 8192,
            "original_max_position_embeddings": 512,
            "sliding_window": 100,
        },
    ),
    "gpt2": ("gpt2", {"n_embd": 256, "n_head": 8, "n_layer": 2, "n_positions": 64, "vocab_size": 160}),
    "gpt2-untied": (
        "gpt2",
        {
            "n_embd": 96,
            "n_head": 3,
            "n_layer": 3,
            "n_inner": 64,
            "layer_norm_epsilon": 1e-3,
            "tie_word_embeddings": False,
        },
    ),
}
# what a GGUF file does not say, or says another way
NOT_STORED = {
    "_name_or_path",
    "architectures",
    "max_window_layers",
    "dtype",
    "transformers_version",
    "hidden_act",
    "head_dim",
}


def _model(name: str) -> Any:
    family, changes = MODELS[name]
    if family == "gpt2":
        return test_gpt.model(family, **changes)
    return tiny.model(family, **{**SHAPE, **changes})


def _import(path: Path, folder: Path) -> Any:
    mqadapt_rs.convert(path, folder, plan="keep", dtype="float32", sync=False)
    return tiny.load(folder)


def _assert_holds(loaded: Any, held: dict[str, np.ndarray]) -> None:
    state = loaded.state_dict()
    assert set(held) <= set(state) <= {*held, "lm_head.weight"}
    for name, values in held.items():
        assert np.array_equal(state[name].numpy().view(np.uint32), values.view(np.uint32)), name


@pytest.mark.parametrize("name", MODELS)
def test_tensors_and_configuration_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    model = _model(name)
    held = gguf_files.write(tmp_path / "model.gguf", model)
    loaded = _import(tmp_path / "model.gguf", tmp_path / "out")
    _assert_holds(loaded, held)

    found = loaded.config.to_dict()
    found.get("rope_parameters", {}).pop("type", None)  # the name that transformers 4 has for `rope_type`
    expected = {field: value for field, value in model.config.to_dict().items() if field not in NOT_STORED}
    assert {field: found.get(field) for field in expected} == expected
    tokens = torch.tensor([tiny.ids(40, SHAPE["vocab_size"])])
    with torch.no_grad():
        difference = (model(tokens).logits - loaded(tokens).logits).abs().max()
    # Gemma's norms lose a bit where 1 is added; else nothing is rounded
    assert difference <= (1e-4 if name.startswith("gemma") else 0)


@pytest.mark.parametrize("kind", ["F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3", "gpt2"])
def test_quantised_tensors_are_those_of_the_package_gguf(name: str, kind: str, tmp_path: Path) -> None:
    held = gguf_files.write(tmp_path / "model.gguf", _model(name), gguf.GGMLQuantizationType[kind])
    _assert_holds(_import(tmp_path / "model.gguf", tmp_path / "out"), held)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3-longrope", "gpt2", "gpt2-untied"])
def test_heads_are_merged_as_in_the_hugging_face_folder(name: str, tmp_path: Path) -> None:
    model = _model(name)
    gguf_files.write(tmp_path / "model.gguf", model)
    model.save_pretrained(tmp_path / "folder")
    for source in ("model.gguf", "folder"):
        mqadapt_rs.convert(tmp_path / source, tmp_path / f"{source}-mqa", plan="mqa:all", dtype="float32", sync=False)
    ours, theirs = (tiny.load(tmp_path / f"{source}-mqa").state_dict() for source in ("model.gguf", "folder"))
    written = [json.loads((tmp_path / f"{source}-mqa/config.json").read_text()) for source in ("model.gguf", "folder")]
    assert written[0].get("num_key_value_heads") == written[1].get("num_key_value_heads") in (1, None)
    assert written[0]["architectures"] == written[1]["architectures"]
    for tensor, values in theirs.items():
        torch.testing.assert_close(ours[tensor], values, rtol=0, atol=1e-6 if name == "gemma3" else 0)


def test_transposed_matrices_do_not_depend_on_how_they_are_cut(tmp_path: Path) -> None:
    """A GPT-2's folder stores the transposes of what its GGUF file has: rows of 3072 bytes, steps of 8 MiB."""
    model = test_gpt.model("gpt2", n_embd=768, n_head=12, n_layer=1, n_inner=4096, n_positions=64, vocab_size=160)
    held = gguf_files.write(tmp_path / "model.gguf", model, gguf.GGMLQuantizationType.Q8_0)
    _assert_holds(_import(tmp_path / "model.gguf", tmp_path / "out"), held)
    source, out = str(tmp_path / "model.gguf"), tmp_path / "cut"
    mqadapt_rs.convert(
        source, out, plan="keep", dtype="float32", max_shard_size=5 << 20, max_memory=1 << 20, sync=False
    )
    assert len(list(out.glob("*.safetensors"))) > 3
    _assert_holds(tiny.load(out), held)
    found = mqadapt_rs.verify(out, against=source)
    assert not found.problems, found.problems
    assert found.compared == found.tensors


@pytest.mark.parametrize("key", ["attention.head_count_kv", "attention.layer_norm_epsilon"])
def test_a_gpt2_that_is_none_is_refused(key: str, tmp_path: Path) -> None:
    gguf_files.write(tmp_path / "model.gguf", _model("gpt2"))
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    file = gguf.GGUFReader(tmp_path / "model.gguf")
    for name in ("context_length", "embedding_length", "block_count", "attention.head_count", "feed_forward_length"):
        writer.add_uint32(f"gpt2.{name}", int(file.fields[f"gpt2.{name}"].parts[-1][0]))
    if key.endswith("kv"):
        writer.add_layer_norm_eps(1e-5)
        writer.add_head_count_kv(2)
    for tensor in file.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(mqadapt_rs.MqadaptError, match=key):
        mqadapt_rs.inspect(tmp_path / "other.gguf")
