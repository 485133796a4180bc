"""Families with no forward pass here, or with one of a part: mixtures of experts, and models that read images beside text.

The oracle is PyTorch: every tensor that the plan does not touch is the source's bit for bit, every touched one is merged by
`tiny.merge_heads`, and transformers computes from the result what it computes from the source with its heads repeated.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

import tiny
from mqadapt_rs import ArgumentError, Calibration, Model, convert, inspect, verify

HEADS, HEAD_DIM = 6, 8
TEXT = {**tiny.SHAPE, "num_hidden_layers": 2}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
          "image_size": 28, "patch_size": 14, "num_channels": 3}  # fmt: skip
EXPERT_FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")
IMAGE_FAMILIES = ("gemma3", "mistral3", "qwen2_5_vl")
PLANS = {"mixed": [3, 1], "alike": [2, 2]}


def config(family: str) -> Any:
    """A configuration of the family."""
    if family in EXPERT_FAMILIES:
        return AutoConfig.for_model(family, **{**TEXT, **EXPERTS})
    text = {"gemma3": "gemma3_text", "mistral3": "mistral", "qwen2_5_vl": "qwen2_5_vl_text"}[family]
    tokens = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
    own = {
        "gemma3": {"vision_config": {"model_type": "siglip_vision_model", **VISION}, "mm_tokens_per_image": 4},
        "mistral3": {"vision_config": {"model_type": "pixtral", "head_dim": 8, **VISION}, "image_token_index": 5},
        "qwen2_5_vl": {"vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
                                         "out_hidden_size": 48, "fullatt_block_indexes": [0]}, **tokens},
    }[family]  # fmt: skip
    rotary = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}} if family == "qwen2_5_vl" else {}
    head_dim = {} if family == "qwen2_5_vl" else {"head_dim": HEAD_DIM}
    described = {k: v for k, v in TEXT.items() if k != "head_dim"} | head_dim | rotary
    return AutoConfig.for_model(family, text_config={"model_type": text, **described}, **own)


def model(family: str) -> PreTrainedModel:
    """A random model, large enough weights that attention is far from uniform."""
    kind = AutoModelForCausalLM if family in EXPERT_FAMILIES else AutoModelForImageTextToText
    out = kind.from_config(config(family), dtype=torch.float32, attn_implementation="eager").eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in out.named_parameters():
            values = torch.randn(parameter.shape, generator=draw)
            wide = 1.5 * values / parameter.shape[-1] ** 0.5
            parameter.copy_(
                1 + 0.3 * values if name.endswith("norm.weight") else wide if parameter.dim() > 1 else 0.3 * values
            )
    return out


def load(folder: Path) -> PreTrainedModel:
    description = json.loads((folder / "config.json").read_text())
    kind = AutoModelForImageTextToText if "vision_config" in description else AutoModelForCausalLM
    options = {"dtype": torch.float32, "attn_implementation": "eager", "trust_remote_code": True}
    return kind.from_pretrained(folder, **options).eval()


def logits(of: PreTrainedModel) -> np.ndarray:
    with torch.no_grad():
        return of(torch.tensor([[t for t in tiny.ids(40, seed=4) if t > 8]])).logits[0].float().numpy()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def layer_of(name: str) -> int | None:
    """The layer of the language model that a K/V tensor belongs to."""
    parts = name.split(".")
    if "vision" in name or "visual" in name or not {"k_proj", "v_proj"} & set(parts):
        return None
    return int(parts[parts.index("layers") + 1])


def split(value: torch.Tensor) -> torch.Tensor:
    return value.reshape(HEADS, HEAD_DIM, *value.shape[1:])


@pytest.mark.parametrize("method", ["mean", "first"])
@pytest.mark.parametrize(
    ("family", "plan"),
    [(family, "alike") for family in EXPERT_FAMILIES + IMAGE_FAMILIES]
    + [(family, "mixed") for family in EXPERT_FAMILIES],
)
def test_conversion(family: str, plan: str, method: str, tmp_path: Path) -> None:
    source = model(family)
    source.save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "out", PLANS[plan], method, sync=False)
    assert report.manifest["plan"]["num_key_value_heads"] == PLANS[plan]
    assert verify(tmp_path / "out", against=tmp_path / "source").problems == []
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "out")
    assert list(before) == list(after)
    touched = 0
    for name, value in before.items():
        layer = layer_of(name)
        if layer is None:
            assert torch.equal(value, after[name]), name
            continue
        wanted = tiny.merge_heads(split(value), PLANS[plan][layer], method).reshape(-1, *value.shape[1:])
        assert torch.equal(after[name], wanted), name
        touched += 1
    assert touched == 2 * 2 * (1 if family not in ("gpt_oss", "qwen2_5_vl") else 2)  # k and v of two layers, biases too
    # in transformers: the source, each merged head repeated over those that it replaces
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            layer = layer_of(name)
            if layer is not None:
                merged = tiny.merge_heads(split(parameter), PLANS[plan][layer], method)
                repeated = merged.repeat_interleave(HEADS // len(merged), 0)
                parameter.copy_(repeated.reshape(parameter.shape))
    np.testing.assert_allclose(logits(load(tmp_path / "out")), logits(source), atol=2e-4)


def test_the_language_model_of_gemma3_is_run(tmp_path: Path) -> None:
    source = model("gemma3")
    source.save_pretrained(tmp_path / "source")
    told = inspect(tmp_path / "source")
    assert told["parameters"] == sum(value.numel() for value in tensors(tmp_path / "source").values())
    ids = [t for t in tiny.ids(40, seed=4) if t > 8]
    for device in ("cpu", "cpu-stock"):
        ours = Model.load(tmp_path / "source", device=device, precision="exact")
        np.testing.assert_allclose(ours.logits(ids), logits(source), atol=2e-4)
    text = [[t for t in tiny.ids(96, seed=seed) if t > 8] for seed in range(4)]
    for sequential in (False, True):
        calibration = Calibration(text, target_context=[32], sequential=sequential)
        out = tmp_path / f"out{sequential}"
        convert(tmp_path / "source", out, "gqa2:all", "closed-form", calibration=calibration, sync=False)
        untouched = {
            name: value for name, value in tensors(tmp_path / "source").items() if "language_model" not in name
        }
        assert all(torch.equal(value, tensors(out)[name]) for name, value in untouched.items())
        converted = Model.load(out, precision="exact").logits(ids)
        np.testing.assert_allclose(converted, logits(load(out)), atol=2e-4)
        overlay = Model.load(tmp_path / "source", "gqa2:all", "closed-form", calibration=calibration, precision="exact")
        assert np.array_equal(overlay.logits(ids), converted)


@pytest.mark.parametrize("family", [f for f in EXPERT_FAMILIES + IMAGE_FAMILIES if f != "gemma3"])
def test_what_needs_a_forward_pass_is_refused(family: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    model(family).save_pretrained(source)
    told = inspect(source)
    assert (told["model_type"], told["num_key_value_heads"]) == (family, [HEADS] * 2)
    assert told["parameters"] == sum(value.numel() for value in tensors(source).values())
    assert told["kv_bytes_per_token"] == 2 * 2 * HEADS * HEAD_DIM * 4
    with pytest.raises(ArgumentError, match=rf"the family {family} cannot be run here.*mean, first and random"):
        Model.load(source)
    for method in ("closed-form", "prune"):
        with pytest.raises(ArgumentError, match=rf"'{method}' runs the model.*use mean, first or random"):
            convert(source, tmp_path / "out", "mqa:all", method, calibration=Calibration([tiny.ids(64)]), sync=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", IMAGE_FAMILIES)
def test_layers_that_differ_are_refused(family: str, tmp_path: Path) -> None:
    model(family).save_pretrained(tmp_path / "source")
    with pytest.raises(ArgumentError, match=r"'hugging-face' cannot hold this plan.*mqa:all"):
        convert(tmp_path / "source", tmp_path / "out", "mqa:0", sync=False)
    assert not (tmp_path / "out").exists()


def test_experts_in_four_bits_pass_through(tmp_path: Path) -> None:
    """gpt-oss stores its experts in mxfp4, its attention in bf16."""
    source = tmp_path / "source"
    model("gpt_oss").to(torch.bfloat16).save_pretrained(source)
    description = json.loads((source / "config.json").read_text())
    description["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn"],
    }
    (source / "config.json").write_text(json.dumps(description))
    convert(source, tmp_path / "out", "mqa:all", sync=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["quantization_config"] == description["quantization_config"]
    assert written["num_key_value_heads"] == 1


def test_norms_over_all_heads_are_merged_with_them(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "olmo2")
    convert(source, tmp_path / "out", "mqa:all", "random", sync=False)
    for name, value in tensors(tmp_path / "out").items():
        if name.endswith("k_norm.weight"):
            assert torch.equal(value, torch.ones(HEAD_DIM)), name


def test_shards_do_not_cut_a_fused_tensor(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "phi3", dtype="bfloat16")
    convert(source, tmp_path / "cut", [3, 6, 1], max_shard_size=3000, sync=False)
    convert(source, tmp_path / "whole", [3, 6, 1], sync=False)
    cut, whole = tensors(tmp_path / "cut"), tensors(tmp_path / "whole")
    assert cut.keys() == whole.keys() == tensors(source).keys()
    assert all(torch.equal(cut[name], value) for name, value in whole.items())
    rows = [len(whole[f"model.layers.{layer}.self_attn.qkv_proj.weight"]) for layer in range(3)]
    assert rows == [HEAD_DIM * (HEADS + 2 * heads) for heads in (3, 6, 1)]
    assert verify(tmp_path / "cut", against=source).problems == []


@pytest.mark.parametrize("rows", [-8, 8])
def test_a_fused_tensor_of_another_height_is_named(rows: int, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = tiny.save(tmp_path / "source", "phi3")
    stored = tensors(source)
    name = "model.layers.1.self_attn.qkv_proj.weight"
    stored[name] = stored[name][:rows].clone() if rows < 0 else torch.cat([stored[name], stored[name][:rows]])
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"layers\.1\.self_attn\.qkv_proj\.weight.*144"):
        inspect(source)


def test_modules_that_belong_in_one_tensor_are_refused_apart(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = tiny.save(tmp_path / "source", "phi3")
    stored = tensors(source)
    value = stored.pop("model.layers.1.self_attn.qkv_proj.weight")
    for nth, name in enumerate("qkv"):
        stored[f"model.layers.1.self_attn.{name}_proj.weight"] = value[nth * 48 : (nth + 1) * 48].clone()
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"layers\.1\.self_attn\.qkv_proj\.weight"):
        inspect(source)
