"""What `convert` makes of a checkpoint: the overlay's twin, an inverse of expansion, and an honest manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import tiny
from mqadapt_rs import Model, convert

METHODS = ["mean", "first", "random"]
PLANS = ["mqa:all", [6, 2, 1], "gqa3:0;gqa2:2", "1, 0, 1"]
BIASES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "gemma": {"attention_bias": True},
    "qwen3": {"attention_bias": True},
}
IDS = tiny.ids(33)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    out = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return out


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_overlay_is_the_converted_checkpoint(family: str, method: str, dtype: str, tmp_path: Path) -> None:
    """Bit for bit: one rounding on both ways, the same kernels behind it."""
    source = tiny.save(tmp_path / "source", family, dtype=dtype, max_shard_size="50KB", **BIASES.get(family, {}))
    for i, plan in enumerate(PLANS):
        overlay = Model.load(source, plan=plan, method=method, seed=5)
        convert(source, tmp_path / str(i), plan=plan, method=method, seed=5)
        converted = Model.load(tmp_path / str(i))
        assert overlay.config.num_key_value_heads == converted.config.num_key_value_heads
        np.testing.assert_array_equal(overlay.logits(IDS), converted.logits(IDS), err_msg=str(plan))


@pytest.mark.parametrize(
    ("stored", "wanted"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_overlay_in_another_dtype(stored: str, wanted: str, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama", dtype=stored, attention_bias=True)
    convert(source, tmp_path / "out", plan="gqa2:0;mqa:2", dtype=wanted)
    assert {str(t.dtype).removeprefix("torch.") for t in tensors(tmp_path / "out").values()} == {wanted}
    overlay = Model.load(source, plan="gqa2:0;mqa:2", dtype=wanted)
    np.testing.assert_array_equal(overlay.logits(IDS), Model.load(tmp_path / "out").logits(IDS))


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["mean", "first"])
def test_weights_are_those_of_pytorch(family: str, dtype: str, method: str, tmp_path: Path) -> None:
    """Bit for bit: the mean is the exact one, rounded to f32 and then to the stored dtype, on both sides."""
    plan = [3, 2, 1]
    source = tiny.save(tmp_path / "source", family, dtype=dtype, **BIASES.get(family, {}))
    convert(source, tmp_path / "out", plan=plan, method=method)
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    shape = tiny.config(family)
    for name, value in before.items():
        heads = plan[int(name.split(".")[2])] if ".layers." in name else 0
        wanted = tiny.merge_kv(name, value, heads, method, shape)
        assert after[name].dtype == value.dtype and after[name].shape == wanted.shape, name
        assert torch.equal(after[name], wanted), name


EXPANSIONS = [(1, 8), (2, 8), (4, 8), (1, 6), (2, 6), (1, 5), (2, 14)]
DTYPES = ["float32", "bfloat16", "float16"]
# every size in every dtype for one family, a few of each for the others: the merge of a head is the same code
EXPANDED = [("llama", dtype, *sizes) for dtype in DTYPES for sizes in EXPANSIONS] + [
    (family, DTYPES[nth % 3], *EXPANSIONS[(nth + step) % 7])
    for nth, family in enumerate(tiny.FAMILIES)
    if family != "llama"
    for step in (0, 3)
]


@pytest.mark.parametrize(("family", "dtype", "own", "expanded"), EXPANDED)
def test_expanded_heads_merge_back(family: str, dtype: str, own: int, expanded: int, tmp_path: Path) -> None:
    """The oracle of every merge: K/V heads expanded by repetition come back. Bit for bit, and not only where the group's
    size is a power of two: our sums are in f64, so that n equal values divided by n give the value itself."""
    shape = {
        "num_attention_heads": expanded,
        "hidden_size": 6 * expanded,
        "num_hidden_layers": 2,
        "tie_word_embeddings": True,
    }
    model = tiny.model(family, num_key_value_heads=own, **shape, **BIASES.get(family, {})).to(tiny.DTYPES[dtype])
    model.save_pretrained(tmp_path / "own")
    tiny.expand(model, expanded).save_pretrained(tmp_path / "expanded")
    plan = [own, own]
    report = convert(tmp_path / "expanded", tmp_path / "back", plan=plan, method="mean")
    before, after = tensors(tmp_path / "own"), tensors(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert json.loads(json.dumps(report.manifest))  # plain data
    np.testing.assert_array_equal(Model.load(tmp_path / "back").logits(IDS), Model.load(tmp_path / "own").logits(IDS))
    # and the expanded model computes the same function
    np.testing.assert_allclose(
        Model.load(tmp_path / "expanded", dtype="float32").logits(IDS),
        Model.load(tmp_path / "own", dtype="float32").logits(IDS),
        atol=1e-3,
    )


def test_random_is_seeded(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama")

    def drawn(name: str, seed: int) -> torch.Tensor:
        convert(source, tmp_path / name, plan="mqa:1", method="random", seed=seed)
        return tensors(tmp_path / name)["model.layers.1.self_attn.k_proj.weight"]

    first = drawn("a", 1)
    assert torch.equal(first, drawn("b", 1))
    assert not torch.equal(first, drawn("c", 2))
    # 384 draws with transformers' initializer_range 0.02: the standard error of the deviation is 0.0007
    assert abs(float(first.std()) - 0.02) < 0.0035


def test_what_goes_along_and_the_manifest(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama", max_shard_size="50KB")
    tiny.save_tokenizer(source, "some text to learn pairs from")
    (source / "LICENSE").write_text("as you like")
    (source / "README.md").write_text("# The model")
    convert(source, tmp_path / "out", plan="mqa:0,2")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE", "README.md"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes(), name
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    assert json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"] == index
    for shard in set(index.values()):
        with safe_open(source / shard, "pt") as before, safe_open(tmp_path / "out" / shard, "pt") as after:
            assert list(before.keys()) == list(after.keys())
            assert after.metadata() == before.metadata()

    manifest = json.loads((tmp_path / "out" / "mqadapt.json").read_text())
    assert manifest["plan"]["num_key_value_heads"] == manifest["num_key_value_heads_after"] == [1, 6, 1]
    assert manifest["num_key_value_heads_before"] == [6, 6, 6]
    assert manifest["method"] == "mean"
    assert manifest["source"]["name"] == str(source)
    assert manifest["kv_bytes_per_token_before"] == 2 * 4 * 8 * 18  # K and V, f32, head_dim 8, 3 x 6 heads
    assert manifest["kv_bytes_per_token_after"] == 2 * 4 * 8 * 8
    before, after = tensors(source), tensors(tmp_path / "out")
    # the relative error of layer 0 by its definition
    error, energy = 0.0, 0.0
    for name in ("k_proj", "v_proj"):
        weight = before[f"model.layers.0.self_attn.{name}.weight"].double().reshape(6, 8, 48)
        error += float((weight - after[f"model.layers.0.self_attn.{name}.weight"].double()).square().sum())
        energy += float(weight.square().sum())
    assert manifest["relative_error"] == pytest.approx([(error / energy) ** 0.5, 0.0, manifest["relative_error"][2]])
    assert 0.1 < manifest["relative_error"][2] < 1.0
    assert manifest["parameters_before"] == sum(t.numel() for t in before.values())
    assert manifest["parameters_after"] == sum(t.numel() for t in after.values())


def test_keep_copies(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "qwen2", dtype="bfloat16")
    convert(source, tmp_path / "out", plan="keep")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_kv_cache_shrinks_as_the_plan_says(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama")
    whole, merged = Model.load(source), Model.load(source, plan=[6, 2, 1])
    assert whole.kv_bytes_per_token == 2 * 4 * 8 * 18  # K and V, f32, head_dim 8, 3 x 6 heads
    assert merged.kv_bytes_per_token == 2 * 4 * 8 * 9
    for model in (whole, merged):
        model.generate(IDS, max_new_tokens=10)
    assert whole.kv_bytes() == 2 * merged.kv_bytes() > 0


def test_fingerprints(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama")
    other = tiny.save(tmp_path / "other", "llama", seed=1)
    loads: list[dict[str, Any]] = [
        {}, {"plan": "mqa:0"}, {"plan": "mqa:1"}, {"plan": "mqa:0", "method": "first"}, {"dtype": "bfloat16"},
        {"plan": "mqa:0", "method": "random"}, {"plan": "mqa:0", "method": "random", "seed": 1},
    ]  # fmt: skip
    prints = [Model.load(source, **options).fingerprint for options in loads]
    prints.append(Model.load(other).fingerprint)
    assert len(set(prints)) == len(prints)
    assert [Model.load(source, **options).fingerprint for options in loads] == prints[:-1]
    assert Model.load(source, plan=[1, 6, 6]).fingerprint == prints[1]
