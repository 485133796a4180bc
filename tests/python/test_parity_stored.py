"""What a checkpoint may store: base models, one or both of a tied pair, 64-bit floats. Each is inspected, converted, verified
and run, and does in transformers what its source did.

Tolerance: as in `test_parity_families.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import tiny
from mqadapt_rs import Calibration, Model, MqadaptError, convert, inspect, verify
from test_parity_families import assert_close

IDS = tiny.ids(40)
TEXT = [tiny.ids(48, seed=seed) for seed in range(12)]
PLANS = {"alike": [2, 2, 2], "mixed": [6, 2, 1], "keep": [6, 6, 6]}
EMBED_TOKENS, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The folder with other tensors."""
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def save_base(folder: Path, family: str, max_shard_size: str = "5GB", **changes: Any) -> Path:
    """What `LlamaModel.save_pretrained` writes, and the others'."""
    tiny.model(family, **changes).base_model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def untouched(before: Path, after: Path, plan: list[int]) -> None:
    """The names are the same, and so is every bit of every tensor that the plan does not touch."""
    config = AutoConfig.from_pretrained(before)
    old, new = tensors_of(before), tensors_of(after)
    assert list(old) == list(new)
    for name, value in old.items():
        layer = int(name.split("layers.")[1].split(".")[0]) if "layers." in name else None
        rows = tiny.kv_rows(name, value, config)
        if layer is None or not rows or plan[layer] == 6:
            assert value.dtype == new[name].dtype, name
            assert torch.equal(value.view(torch.uint8), new[name].view(torch.uint8)), name
        else:
            assert value.dtype == new[name].dtype and len(new[name]) == len(value) - len(rows) * 8 * (
                6 - plan[layer]
            ), name


def base_states(folder: Path) -> np.ndarray:
    """The last hidden state, `[seq_len, hidden_size]`, of the base model in transformers."""
    model = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=True)
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).last_hidden_state[0].numpy()


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("size", ["5GB", "40KB"])
def test_base_model_is_converted(family: str, plan: str, size: str, tmp_path: Path) -> None:
    source = save_base(tmp_path / "source", family, size)
    assert EMBED_TOKENS.removeprefix("model.") in tensors_of(source)
    told = inspect(source)
    assert told["parameters"] == sum(value.numel() for value in tensors_of(source).values())
    out = tmp_path / "out"
    convert(source, out, plan=PLANS[plan], sync=False)
    assert verify(out, against=source).problems == []
    untouched(source, out, PLANS[plan])
    described = json.loads((out / "config.json").read_text())
    kind = "LayerwiseKV" if plan == "mixed" else ""
    assert described["architectures"] == [kind + tiny.base_class(family)]
    # its output in transformers is that of the whole model, converted by PyTorch
    reference = tiny.convert(tiny.model(family), PLANS[plan], "mean").base_model
    with torch.no_grad():
        wanted = reference(torch.tensor([IDS])).last_hidden_state[0].numpy()
    assert_close(base_states(out), wanted, "last hidden state")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tied_base_model_runs(family: str, tmp_path: Path) -> None:
    source = save_base(tmp_path / "source", family, tie_word_embeddings=True)
    ours = Model.load(source)
    assert_close(ours.logits(IDS), tiny.logits(tiny.load(source), IDS), "logits")
    convert(source, tmp_path / "out", plan="mqa:all", sync=False)
    written = Model.load(tmp_path / "out").logits(IDS)
    np.testing.assert_array_equal(Model.load(source, plan="mqa:all").logits(IDS), written)
    assert_close(written, tiny.logits(tiny.load(tmp_path / "out"), IDS), "converted")
    assert ours.perplexity(IDS, context=16) > 1


def test_base_model_by_a_layer_method(tmp_path: Path) -> None:
    source = save_base(tmp_path / "source", "llama", tie_word_embeddings=True)
    calibration = Calibration(TEXT, target_context=[32])
    out = tmp_path / "out"
    convert(source, out, plan="mqa:all", method="closed-form", calibration=calibration, sync=False)
    assert verify(out, against=source).problems == []
    assert list(tensors_of(out)) == list(tensors_of(source))
    assert_close(Model.load(out).logits(IDS), tiny.logits(tiny.load(out), IDS), "logits")


def test_untied_base_model_gives_no_logits(tmp_path: Path) -> None:
    source = save_base(tmp_path / "source", "llama", tie_word_embeddings=False)
    for call in (lambda: Model.load(source), lambda: Model.load(source, plan="mqa:0")):
        with pytest.raises(MqadaptError, match=r"source: this is a base model: it has no 'lm_head\.weight'"):
            call()


def test_base_model_with_an_output_projection(tmp_path: Path) -> None:
    whole = tiny.save(tmp_path / "whole", "llama", tie_word_embeddings=False)
    source = tiny.save(tmp_path / "source", "llama", tie_word_embeddings=False)
    rewrite(source, {name.removeprefix("model."): value for name, value in tensors_of(source).items()})
    np.testing.assert_array_equal(Model.load(source).logits(IDS), Model.load(whole).logits(IDS))
    assert_close(Model.load(source).logits(IDS), tiny.logits(tiny.load(source), IDS), "logits")


def test_missing_tensor_of_a_base_model_is_named_as_stored(tmp_path: Path) -> None:
    source = save_base(tmp_path / "source", "llama")
    tensors = tensors_of(source)
    del tensors["layers.1.mlp.up_proj.weight"]
    rewrite(source, tensors)
    with pytest.raises(MqadaptError, match=r"'layers\.1\.mlp\.up_proj\.weight'"):
        inspect(source)


def tied(folder: Path, family: str, **changes: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    source = tiny.save(folder, family, tie_word_embeddings=True, **changes)
    tensors = tensors_of(source)
    assert LM_HEAD not in tensors
    return source, tensors


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("flag", [True, None])
def test_tied_pair_with_another_lm_head(family: str, flag: bool | None, tmp_path: Path) -> None:
    """transformers 5 takes the file's word against the configuration's."""
    source, tensors = tied(tmp_path / "source", family)
    rewrite(source, tensors | {LM_HEAD: tensors[EMBED_TOKENS].flip(0).clone()})
    if flag is None:  # Gemma ties where the flag is absent, the others do not
        described = json.loads((source / "config.json").read_text())
        del described["tie_word_embeddings"]
        (source / "config.json").write_text(json.dumps(described))
    check_pair(source, tmp_path / "out")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tied_pair_stored_twice(family: str, tmp_path: Path) -> None:
    source, tensors = tied(tmp_path / "source", family)
    rewrite(source, tensors | {LM_HEAD: tensors[EMBED_TOKENS].clone()})
    check_pair(source, tmp_path / "out")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tied_pair_of_which_only_lm_head_is_stored(family: str, tmp_path: Path) -> None:
    source, tensors = tied(tmp_path / "source", family)
    tensors[LM_HEAD] = tensors.pop(EMBED_TOKENS)
    rewrite(source, tensors)
    check_pair(source, tmp_path / "out")


def check_pair(source: Path, out: Path) -> None:
    assert_close(Model.load(source).logits(IDS), tiny.logits(tiny.load(source), IDS), "logits")
    assert inspect(source)["num_hidden_layers"] == 3
    convert(source, out, plan="mqa:all", sync=False)
    untouched(source, out, [1, 1, 1])
    assert verify(out, against=source).problems == []
    written = Model.load(out).logits(IDS)
    np.testing.assert_array_equal(Model.load(source, plan="mqa:all").logits(IDS), written)
    assert_close(written, tiny.logits(tiny.load(out), IDS), "converted")


def test_untied_pair_of_which_only_lm_head_is_stored(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "source", "llama", tie_word_embeddings=False)
    tensors = tensors_of(source)
    del tensors[EMBED_TOKENS]
    with pytest.raises(MqadaptError, match=EMBED_TOKENS):
        inspect(rewrite(source, tensors))


def test_lm_head_of_another_shape_than_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    source, tensors = tied(tmp_path / "source", "llama")
    rewrite(source, tensors | {LM_HEAD: tensors[EMBED_TOKENS][:-1].clone()})
    with pytest.raises(MqadaptError, match=LM_HEAD):
        Model.load(source)


def save_f64(folder: Path, family: str, **changes: Any) -> Path:
    """Weights that no 32-bit float holds."""
    model = tiny.model(family, **changes).double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-9 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
    model.save_pretrained(folder)
    assert all(value.dtype == torch.float64 for value in tensors_of(folder).values())
    return folder


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_f64(family: str, tmp_path: Path) -> None:
    source = save_f64(tmp_path / "source", family)
    ours = Model.load(source)
    assert ours.dtype == "float32"
    assert_close(ours.logits(IDS), tiny.logits(tiny.load(source), IDS), "logits")
    assert inspect(source)["bytes"] == sum(8 * value.numel() for value in tensors_of(source).values())
    out = tmp_path / "out"
    for plan in PLANS.values():
        report = convert(source, out, plan=plan, sync=False, overwrite=True)
        assert report.manifest["dtype"] == "float64"
        untouched(source, out, plan)
        assert verify(out, against=source).problems == []
        written = Model.load(out).logits(IDS)
        np.testing.assert_array_equal(Model.load(source, plan=plan).logits(IDS), written)
        theirs = tiny.load(out, torch.float64, trust_remote_code=True)
        assert theirs.dtype == torch.float64
        assert_close(written, tiny.logits(theirs, IDS), "converted")


@pytest.mark.parametrize("dtype", tiny.DTYPES)
def test_f64_to_another_dtype(dtype: str, tmp_path: Path) -> None:
    source = save_f64(tmp_path / "source", "llama")
    convert(source, tmp_path / "out", plan=[6, 1, 2], dtype=dtype, sync=False)
    assert verify(tmp_path / "out", against=source).problems == []
    old, new = tensors_of(source), tensors_of(tmp_path / "out")
    for name, value in new.items():
        assert value.dtype == tiny.DTYPES[dtype]
        if value.shape == old[name].shape:
            # rounded once: PyTorch goes by way of f32, and misses the nearer of two where that makes a tie
            theirs = old[name].to(tiny.DTYPES[dtype]).double()
            off, theirs_off = (value.double() - old[name]).abs(), (theirs - old[name]).abs()
            assert (off <= theirs_off).all() and (off == theirs_off).double().mean() > 0.99, name
    assert Model.load(source, dtype=dtype).dtype == dtype
    overlay = Model.load(source, plan=[6, 1, 2], dtype=dtype).logits(IDS)
    np.testing.assert_array_equal(overlay, Model.load(tmp_path / "out").logits(IDS))


def test_f64_by_a_layer_method(tmp_path: Path) -> None:
    source = save_f64(tmp_path / "source", "llama")
    calibration = Calibration(TEXT, target_context=[32])
    out = tmp_path / "out"
    convert(source, out, plan="mqa:all", method="closed-form", calibration=calibration, sync=False)
    assert verify(out, against=source).problems == []
    assert all(value.dtype == torch.float64 for value in tensors_of(out).values())
    assert_close(Model.load(out).logits(IDS), tiny.logits(tiny.load(out), IDS), "logits")


def test_f64_beside_halves(tmp_path: Path) -> None:
    """A norm in 64 bits is not rounded to the dtype of the matrices, unless that is asked for."""
    source = tiny.save(tmp_path / "source", "llama", dtype="bfloat16")
    tensors = tensors_of(source)
    draw = torch.Generator().manual_seed(2)
    for name in [name for name in tensors if name.endswith("norm.weight")]:
        tensors[name] = 1 + 0.3 * torch.randn(tensors[name].shape, generator=draw, dtype=torch.float64)
    rewrite(source, tensors)
    ours = Model.load(source)
    assert ours.dtype == "bfloat16"
    wanted = tiny.logits(tiny.load(source), IDS)
    assert_close(Model.load(source, dtype="float32").logits(IDS), wanted, "in f32")
    convert(source, tmp_path / "out", plan="keep", sync=False)
    untouched(source, tmp_path / "out", [6, 6, 6])


def test_f64_that_f32_does_not_hold(tmp_path: Path) -> None:
    source = save_f64(tmp_path / "source", "llama")
    tensors = tensors_of(source)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e300
    rewrite(source, tensors)
    with pytest.raises(MqadaptError, match=r"up_proj\.weight"):
        convert(source, tmp_path / "out", plan="keep", dtype="float32", sync=False)
    convert(source, tmp_path / "out", plan="keep", sync=False)
    untouched(source, tmp_path / "out", [6, 6, 6])


def test_base_model_reloads_what_transformers_saves(tmp_path: Path) -> None:
    source = save_base(tmp_path / "source", "mistral")
    convert(source, tmp_path / "out", plan=PLANS["mixed"], sync=False)
    again = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    again.save_pretrained(tmp_path / "again")
    np.testing.assert_array_equal(base_states(tmp_path / "again"), base_states(tmp_path / "out"))
    assert inspect(tmp_path / "again")["num_key_value_heads"] == PLANS["mixed"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True, dtype=torch.float32)
    with torch.no_grad():
        states = theirs.eval().model(torch.tensor([IDS])).last_hidden_state[0].numpy()
    assert_close(states, base_states(tmp_path / "out"), "with a head that transformers draws")
