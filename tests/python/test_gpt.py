"""GPT-2 and GPT-NeoX: families whose classes in transformers have as many K/V heads as query heads.

The oracle is PyTorch: transformers runs the source with its heads merged and repeated. Tolerance: as in
`test_parity_families.py`. Merged heads are written as a GPT-BigCode (GPT-2), or for our modelling file (both).
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
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import tiny
from mqadapt_rs import ArgumentError, Calibration, Model, MqadaptError, convert, inspect, verify
from test_modeling import transformers_457  # noqa: F401
from test_parity_families import assert_close

HEADS, HEAD_DIM = 6, 8
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 48, "n_head": HEADS, "n_layer": 3, "n_positions": 160, "vocab_size": 160},
    "gpt_neox": {"hidden_size": 48, "num_attention_heads": HEADS, "num_hidden_layers": 3, "intermediate_size": 80,
                 "vocab_size": 160, "max_position_embeddings": 256, "rotary_pct": 0.5},
}  # fmt: skip
FAMILIES = tuple(SIZES)
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "gpt2": {
        "plain": {},
        "unscaled": {"scale_attn_weights": False, "n_inner": 64, "tie_word_embeddings": False},
        "gelu": {"activation_function": "gelu", "layer_norm_epsilon": 1e-3},
        "odd_heads": {"n_embd": 45, "n_head": 5},
    },
    "gpt_neox": {
        "plain": {},
        "one_after_the_other": {"use_parallel_residual": False, "rotary_pct": 0.25, "rotary_emb_base": 500},
        "whole_rotation": {"rotary_pct": 1.0, "hidden_act": "gelu_new", "tie_word_embeddings": True},
        "no_bias": {"attention_bias": False, "layer_norm_eps": 1e-3},
        "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    },
}
PLANS = ([1, 1, 1], [6, 2, 1], [2, 2, 2], [6, 6, 3])
IDS = tiny.ids(40)
TEXT = [tiny.ids(96, seed=1), tiny.ids(96, seed=2), tiny.ids(50, seed=3)]


def model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model in which every parameter matters."""
    config = AutoConfig.for_model(family, **{**SIZES[family], **changes})
    out = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in out.named_parameters():
            values = torch.randn(parameter.shape, generator=draw)
            if parameter.dim() == 1:
                norm = name.endswith("weight")
                parameter.copy_(0.3 * values + float(norm))
            else:
                parameter.copy_(1.5 * values / config.hidden_size**0.5)
    return out


def save(folder: Path, family: str, dtype: str = "float32", max_shard_size: str = "5GB", **changes: Any) -> Path:
    model(family, **changes).to(tiny.DTYPES[dtype]).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def projections(family: str, name: str, value: torch.Tensor) -> list[torch.Tensor] | None:
    """Queries, keys and values of a fused tensor of a source, `[heads, head_dim, ...]`; `None` for another tensor."""
    if "c_attn" in name:
        rows = value.T if value.dim() == 2 else value
        return list(rows.reshape(3, HEADS, HEAD_DIM, *rows.shape[1:]))
    if "query_key_value" in name:
        return list(value.reshape(HEADS, 3, HEAD_DIM, *value.shape[1:]).unbind(1))
    return None


def fused(family: str, parts: list[torch.Tensor], dims: int) -> torch.Tensor:
    """The fused tensor of a source."""
    if family == "gpt2":
        rows = torch.cat(parts).flatten(0, 1)
        return rows.T if dims == 2 else rows
    return torch.stack(parts, 1).flatten(0, 2)


def layer_of(name: str) -> int:
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)


def merged(source: PreTrainedModel, plan: list[int], method: str) -> PreTrainedModel:
    """The source, each merged head, rounded to the dtype, repeated over those that it replaces."""
    family = source.config.model_type
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            parts = projections(family, name, parameter)
            if parts is None:
                continue
            heads = plan[layer_of(name)]
            for at in (1, 2):
                own = tiny.merge_heads(parts[at], heads, method).to(parameter.dtype)
                parts[at] = own.repeat_interleave(HEADS // heads, 0)
            parameter.copy_(fused(family, parts, parameter.dim()))
    return source


def written(family: str, name: str, value: torch.Tensor, heads: int, method: str) -> torch.Tensor:
    """What a conversion that changes heads writes in place of a tensor of the source."""
    parts = projections(family, name, value)
    if parts is not None:
        parts[1:] = [tiny.merge_heads(part, heads, method).to(value.dtype) for part in parts[1:]]
        return torch.cat(parts).flatten(0, 1)
    linear = family == "gpt2" and "h" in name.split(".") and value.dim() == 2
    return value.T if linear else value


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return tiny.load(folder, trust_remote_code=True, **options)


every_family = pytest.mark.parametrize("family", FAMILIES)
EVERY_SHAPE = [(family, shape) for family in FAMILIES for shape in SHAPES[family]]
every_shape = pytest.mark.parametrize(("family", "shape"), EVERY_SHAPE)
of_six_heads = [own for own in EVERY_SHAPE if own[1] != "odd_heads"]
every_shape_of_six_heads = pytest.mark.parametrize(("family", "shape"), of_six_heads)


@every_shape
def test_every_layer(family: str, shape: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", family, **SHAPES[family][shape])
    reference = tiny.load(folder)
    for device in ("cpu", "cpu-stock"):
        ours = Model.load(folder, device=device)
        for length in (1, 2, 17, 128):
            ids = tiny.ids(length, seed=length)
            with torch.no_grad():
                theirs = reference(torch.tensor([ids]), output_hidden_states=True)
            states = ours.hidden_states(ids)
            for i, (own, other) in enumerate(zip(states, theirs.hidden_states, strict=True)):
                assert_close(own, other[0].numpy(), f"{device}: {length} tokens, before layer {i}")
            assert_close(ours.logits(ids), theirs.logits[0].numpy(), f"{device}: {length} tokens, logits")


@every_family
@pytest.mark.parametrize("steps", [[1] * 39, [17, 1, 1, 20], [39, 1]], ids=["one_by_one", "pieces", "prefill_and_one"])
def test_through_the_cache(family: str, steps: list[int], tmp_path: Path) -> None:
    folder = save(tmp_path / "model", family)
    pieces = Model.load(folder).logits_in_steps(IDS, steps)
    assert_close(pieces, tiny.logits(tiny.load(folder), IDS), "against transformers without a cache")


@every_shape_of_six_heads
@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("method", ["mean", "first"])
def test_conversion(family: str, shape: str, plan: list[int], method: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", family, max_shard_size="60KB", **SHAPES[family][shape])
    out = tmp_path / "out"
    convert(source, out, plan, method, sync=False)
    assert verify(out, against=source).problems == []
    before, after = tensors(source), tensors(out)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], written(family, name, value, plan[layer_of(name)], method)), name
    theirs, wanted = load(out), tiny.logits(merged(tiny.load(source), plan, method), IDS)
    assert_close(tiny.logits(theirs, IDS), wanted, "transformers")
    ours = Model.load(out)
    assert ours.config.num_key_value_heads == plan
    assert_close(ours.logits(IDS), wanted, "ours")
    assert_close(ours.logits_in_steps(IDS, [20] + [1] * 20), wanted, "ours through the cache")
    overlay = Model.load(source, plan=plan, method=method)
    np.testing.assert_array_equal(overlay.logits(IDS), ours.logits(IDS))
    stock = family == "gpt2" and plan == [1, 1, 1]
    described = json.loads((out / "config.json").read_text())
    assert ("auto_map" in described) != stock and (out / "modeling_mqadapt.py").exists() != stock
    assert described["model_type"] == {"gpt2": "gpt_bigcode"}.get(family, family)
    if not stock:
        with pytest.raises(Exception, match=r"num_key_value_heads|size mismatch|mismatched"):
            AutoModelForCausalLM.from_pretrained(out, trust_remote_code=False)


@every_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("method", ["mean", "first", "random"])
def test_overlay_is_the_converted_checkpoint(family: str, dtype: str, method: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", family, dtype=dtype)
    for nth, plan in enumerate(PLANS):
        convert(source, tmp_path / str(nth), plan, method, seed=5, sync=False)
        overlay = Model.load(source, plan=plan, method=method, seed=5)
        np.testing.assert_array_equal(overlay.logits(IDS), Model.load(tmp_path / str(nth)).logits(IDS))
        for name, value in tensors(tmp_path / str(nth)).items():
            assert value.dtype == tiny.DTYPES[dtype], name


@every_family
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("length", [1, 100])
def test_half_precision(family: str, dtype: str, length: int, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", family, dtype=dtype)
    ids = tiny.ids(length)
    exact = tiny.logits(tiny.load(folder), ids)
    theirs = tiny.logits(tiny.load(folder, tiny.DTYPES[dtype]), ids)

    def off(logits: np.ndarray) -> float:
        return float(np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2)))

    ours = Model.load(folder)
    for logits in (ours.logits(ids), ours.logits_in_steps(ids, [1] * (length - 1))):
        assert off(logits) <= 1.5 * off(theirs), f"ours {off(logits):.2e}, transformers {off(theirs):.2e}"


@every_family
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_keep_is_the_source(family: str, dtype: str | None, tmp_path: Path) -> None:
    source = save(tmp_path / "source", family)
    convert(source, tmp_path / "out", "keep", dtype=dtype, sync=False)
    assert verify(tmp_path / "out", against=source).problems == []
    before, after = tensors(source), tensors(tmp_path / "out")
    assert list(before) == list(after)
    for name, value in before.items():
        assert torch.equal(after[name], value.to(tiny.DTYPES[dtype] if dtype else value.dtype)), name
    described, own = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert own | {"dtype": None} == described | {"dtype": None}


@every_family
def test_a_base_model_of_doubles(family: str, tmp_path: Path) -> None:
    """Names without a prefix, a dtype that nothing computes in, buffers of old files, and a conversion of a conversion."""
    whole = model(family).double()
    source = tmp_path / "source"
    whole.base_model.save_pretrained(source)
    buffers = {"gpt2": ["h.0.attn.bias", "h.0.attn.masked_bias"], "gpt_neox": ["layers.0.attention.bias"]}[family]
    stored = tensors(source) | {name: torch.ones(1, 1, 4, 4, dtype=torch.uint8) for name in buffers}
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    for nth, plan in enumerate(([6, 2, 2], [1, 2, 1])):
        out = tmp_path / str(nth)
        convert(source, out, plan, sync=False)
        assert verify(out, against=source).problems == []
        for name, value in tensors(out).items():
            wanted = written(family, name, stored[name], plan[layer_of(name)], "mean")
            # a merged head is computed in f32
            same = torch.equal(value, wanted) if "attn" not in name or "bias" in name else torch.allclose(value, wanted)
            assert same, name
    convert(tmp_path / "0", tmp_path / "again", [1, 2, 1], sync=False)
    for name, value in tensors(tmp_path / "again").items():
        assert torch.allclose(value.double(), tensors(tmp_path / "1")[name].double(), atol=1e-6), name


@every_family
def test_generation_and_scores(family: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", family)
    convert(source, tmp_path / "out", [6, 2, 1], sync=False)
    for folder in (source, tmp_path / "out"):
        ours, theirs = Model.load(folder), load(folder)
        wanted = ours.generate(IDS[:10], max_new_tokens=30, stop_tokens=[])
        prompt = torch.tensor([IDS[:10]])
        options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0}
        for cache in ({}, {"cache_implementation": "static"}):
            out = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **options, **cache)
            assert out[0, 10:].tolist() == wanted
        theirs.set_attn_implementation("sdpa")
        assert_close(ours.logits(IDS), tiny.logits(theirs, IDS), "sdpa")
        (score, _), _ = ours.loglikelihood([(IDS[:20], IDS[20:]), (IDS[:1], IDS[1:3])])
        logits = torch.from_numpy(tiny.logits(theirs, IDS)).double()[19:-1].log_softmax(-1)
        assert score == pytest.approx(logits[range(20), IDS[20:]].sum().item(), abs=2e-3)


@every_family
def test_cache_holds_the_plans_heads_and_padding_is_masked(family: str, tmp_path: Path) -> None:
    convert(save(tmp_path / "source", family), tmp_path / "out", [6, 2, 1], sync=False)
    theirs = load(tmp_path / "out")
    padded = torch.tensor([[0, 0, 0, *IDS]])
    mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=theirs.config)
    with torch.no_grad():
        out = theirs(padded, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
    assert_close(Model.load(tmp_path / "out").logits(IDS), out.logits[0, 3:].numpy(), "logits")
    assert [layer.keys.shape[1] for layer in cache.layers] == [6, 2, 1]
    theirs.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    np.testing.assert_array_equal(tiny.logits(again, IDS), tiny.logits(theirs, IDS))
    np.testing.assert_array_equal(Model.load(tmp_path / "again").logits(IDS), Model.load(tmp_path / "out").logits(IDS))
    tokens = torch.tensor([IDS])
    before = theirs(tokens, labels=tokens).loss  # without dropout
    before.backward()
    torch.optim.SGD(theirs.parameters(), lr=1e-4).step()
    assert theirs(tokens, labels=tokens).loss < before


@every_family
@pytest.mark.parametrize("sequential", [False, True])
def test_closed_form(family: str, sequential: bool, tmp_path: Path) -> None:
    """Heads that are alike merge without a loss, in transformers and as an overlay; others with less than `mean`'s."""
    alike = merged(model(family), [2, 2, 2], "mean")
    alike.save_pretrained(tmp_path / "alike")
    calibration = Calibration(TEXT, target_context=[32, 96], sequential=sequential)
    convert(tmp_path / "alike", tmp_path / "out", [2, 2, 2], "closed-form", calibration=calibration, sync=False)
    expected = tiny.logits(alike, IDS)
    np.testing.assert_allclose(tiny.logits(load(tmp_path / "out"), IDS), expected, atol=3e-3 * np.abs(expected).max())
    source = save(tmp_path / "source", family)
    exact = Model.load(source).logits(IDS)
    loss = {}
    methods: dict[str, dict[str, Any]] = {"mean": {}, "closed-form": {"calibration": calibration}}
    if not sequential:
        methods["prune"] = {"calibration": calibration}
    for method, options in methods.items():
        out = tmp_path / method
        convert(source, out, [3, 3, 3], method, sync=False, **options)
        assert verify(out, against=source).problems == []
        found = Model.load(out).logits(IDS)
        loss[method] = float(np.mean((found - exact) ** 2))
        if not sequential:
            np.testing.assert_array_equal(
                Model.load(source, plan=[3, 3, 3], method=method, **options).logits(IDS), found
            )
    assert loss["closed-form"] < loss["mean"], loss


def test_positions_end(tmp_path: Path) -> None:
    ours = Model.load(save(tmp_path / "model", "gpt2"))
    assert len(ours.logits(tiny.ids(160))) == 160
    for refused in (
        lambda: ours.logits(tiny.ids(161)),
        lambda: ours.generate(tiny.ids(150), max_new_tokens=20, stop_tokens=[]),
        lambda: convert(
            tmp_path / "model",
            tmp_path / "out",
            "mqa:0",
            "closed-form",
            calibration=Calibration([tiny.ids(200)]),
            sync=False,
        ),
    ):
        with pytest.raises(ArgumentError, match="beyond 160 tokens this model has no positions"):
            refused()


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "reorder_and_upcast_attn", True),
        ("gpt2", "add_cross_attention", True),
        ("gpt2", "num_key_value_heads", 2),
        ("gpt2", "activation_function", "relu"),
        ("gpt2", "n_head", 7),
        ("gpt_neox", "num_key_value_heads", 2),
        ("gpt_neox", "rotary_pct", 0.1),
        ("gpt_neox", "hidden_act", "relu"),
        ("gpt_bigcode", "multi_query", False),
    ],
)
def test_refused_by_name(family: str, field: str, value: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "gpt2" if family == "gpt_bigcode" else family)
    if family == "gpt_bigcode":
        convert(folder, tmp_path / "mqa", "mqa:all", sync=False)
        folder = tmp_path / "mqa"
    described = json.loads((folder / "config.json").read_text())
    described.pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(described | {field: value}))
    with pytest.raises(MqadaptError, match=field if field != "n_head" else "head_dim|n_head") as caught:
        inspect(folder)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("name", ["h.1.attn.c_attn.weight", "h.2.mlp.c_fc.weight"])
def test_a_tensor_of_another_shape_is_named(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "gpt2")
    stored = tensors(folder)
    stored[f"transformer.{name}"] = stored[f"transformer.{name}"].T.contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MqadaptError, match=name.replace(".", r"\.")):
        inspect(folder)


@pytest.mark.slow
def test_transformers_457(transformers_457: Path, tmp_path: Path) -> None:  # noqa: F811
    folders = []
    for family in FAMILIES:
        source = save(tmp_path / family, family)
        for plan in ([6, 2, 1], [1, 1, 1]) if family == "gpt2" else ([6, 2, 1],):
            folder = tmp_path / f"{family}{plan[0]}"
            convert(source, folder, plan)
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
