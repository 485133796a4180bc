"""Texts beyond the original context of `longrope` and `dynamic`, against transformers: their rotation depends on their length.

Every text is read by a fresh reference: transformers keeps what a longer text made of `dynamic`. Tolerance: as in
`test_parity_families.py`.
"""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import test_gpt
import tiny
from mqadapt_rs import ArgumentError, Calibration, Model, MqadaptError, convert
from test_parity_families import assert_close

CONTEXT = 48
SHORT, LONG = [1.0, 1.3, 2.0, 5.0], [2.0, 4.0, 8.0, 16.0]
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
STRETCHED = {"max_position_embeddings": 192, "original_max_position_embeddings": CONTEXT}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_longrope": ("llama", {"rope_scaling": {**LONGROPE, "factor": 4.0, "original_max_position_embeddings": CONTEXT}}),
    "llama_dynamic": ("llama", {"rope_scaling": DYNAMIC, "max_position_embeddings": CONTEXT, "num_key_value_heads": 2}),
    "phi3_longrope": ("phi3", {"rope_scaling": LONGROPE, **STRETCHED}),
    "phi3_longrope_partial": ("phi3", {
        "rope_parameters": {"rope_type": "longrope", "short_factor": SHORT[:2], "long_factor": LONG[:2], "rope_theta": 1e4,
                            "partial_rotary_factor": 0.5}, **STRETCHED}),
    "gpt_neox_dynamic_partial": ("gpt_neox", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.5},
                                              "max_position_embeddings": CONTEXT}),
    # frequencies of the layers without a window change at one length, those of the others at another
    "gemma3_by_kind": ("gemma3_text", {
        "max_position_embeddings": CONTEXT + 20,
        "rope_parameters": {
            "full_attention": {**LONGROPE, "rope_theta": 1e4, "factor": 3.0, "original_max_position_embeddings": CONTEXT},
            "sliding_attention": {**DYNAMIC, "rope_theta": 100.0}}}),
    "smollm3_dynamic": ("smollm3", {"rope_scaling": DYNAMIC, "max_position_embeddings": CONTEXT}),
}  # fmt: skip
NAMES = tuple(CASES)
LENGTHS = [20, CONTEXT, CONTEXT + 1, CONTEXT + 21, 150]
pytestmark = pytest.mark.filterwarnings("ignore:.*max_position_embeddings.*")


def save(folder: Path, name: str) -> Path:
    family, changes = CASES[name]
    return (test_gpt if family == "gpt_neox" else tiny).save(folder, family, **changes)


@functools.cache
def loaded(folder: Path) -> PreTrainedModel:
    return tiny.load(folder)


def fresh(folder: Path) -> PreTrainedModel:
    """The checkpoint in transformers, as it is before it reads its first text."""
    return copy.deepcopy(loaded(folder))


def reference(folder: Path, ids: list[int]) -> np.ndarray:
    """Logits of a text that is read at once."""
    return read(folder, tuple(ids))


@functools.cache
def read(folder: Path, ids: tuple[int, ...]) -> np.ndarray:
    return tiny.logits(fresh(folder), list(ids))


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp(request.param) / "model", request.param)


every_case = pytest.mark.parametrize("folder", NAMES, indirect=True)
# one that has two sets of frequencies, one that has a set for every length, one that has both
each_kind = pytest.mark.parametrize("folder", ["llama_longrope", "llama_dynamic", "gemma3_by_kind"], indirect=True)


@every_case
@pytest.mark.parametrize("device", ["cpu", "cpu-stock"])
def test_texts_on_both_sides_of_the_original_context(device: str, folder: Path) -> None:
    model = Model.load(folder, device=device)
    for length in [*LENGTHS, LENGTHS[0]]:  # and back
        ids = tiny.ids(length, seed=length)
        with torch.no_grad():
            theirs = fresh(folder)(torch.tensor([ids]), output_hidden_states=True)
        for i, (own, other) in enumerate(zip(model.hidden_states(ids), theirs.hidden_states, strict=True)):
            assert_close(own, other[0].numpy(), f"{length} tokens, before layer {i}")
        assert_close(model.logits(ids), theirs.logits[0].numpy(), f"{length} tokens, logits")
        # the rotation is that of the whole text from its first piece on
        steps = [min(length, CONTEXT) - 3] + [1] * 6
        assert_close(model.logits_in_steps(ids, steps), theirs.logits[0].numpy(), f"{length} tokens, in pieces")


@every_case
def test_the_rotation_changes(folder: Path) -> None:
    """What is compared above is there: with the frequencies of the original context the logits would be others."""
    ids = tiny.ids(150)
    model = Model.load(folder)
    beginning, whole = model.logits(ids[:CONTEXT]), model.logits(ids)[:CONTEXT]
    assert np.abs(beginning - whole).max() > 0.05 * np.abs(whole).max()


@each_kind
@pytest.mark.parametrize("device", ["cpu", "cpu-stock"])
def test_scores_of_many_lengths(device: str, folder: Path) -> None:
    """Requests of all lengths that share beginnings. As lm-eval feeds transformers, the last token is not read."""
    model = Model.load(folder, device=device)
    shared = tiny.ids(150, seed=4)
    requests = [(shared[:a], shared[a:b]) for a, b in [(40, 60), (40, 49), (40, 48), (10, 50), (100, 150), (30, 31)]]
    requests += [(shared[:46], tiny.ids(n, seed=n)) for n in (1, 2, 3, 4, 30)]
    requests += [(tiny.ids(90, seed=9), tiny.ids(5, seed=8)), requests[0], (shared[:60], [])]
    answers = model.loglikelihood(requests)
    for (context, continuation), (score, is_greedy) in zip(requests, answers, strict=True):
        if not continuation:
            assert (score, is_greedy) == (0.0, True)
            continue
        logits = torch.tensor(reference(folder, context + continuation[:-1]))[len(context) - 1 :].double()
        wanted = logits.log_softmax(-1)[range(len(continuation)), continuation].sum().item()
        assert score == pytest.approx(wanted, abs=1e-4 * len(continuation))
        assert is_greedy == (logits.argmax(-1).tolist() == continuation)
    if device == "cpu":
        alone = [
            Model.load(folder, max_tokens_in_flight=most).loglikelihood([r])[0] for r in requests for most in (7, 1024)
        ]
        assert alone == [answer for answer in answers for _ in range(2)]
        assert Model.load(folder, max_tokens_in_flight=33).loglikelihood(requests) == answers


@each_kind
def test_perplexity_of_long_windows(folder: Path) -> None:
    ids, context = tiny.ids(200, seed=6), 64
    nll = []
    for start in (0, 64, 128):
        window = ids[start : start + context]
        logits = torch.tensor(reference(folder, window[:-1])).double()
        nll.append(torch.nn.functional.cross_entropy(logits, torch.tensor(window[1:])).item())
    assert Model.load(folder).perplexity(ids, context=context) == pytest.approx(np.exp(np.mean(nll)), rel=1e-5)


@each_kind
def test_hidden_states_of_many_lengths(folder: Path) -> None:
    """Hidden states of a text are those of all of its tokens, whatever is beside it."""
    sequences = [tiny.ids(length, seed=length) for length in (10, 60, 0, 48, 49, 60, 140, 5)]
    model = Model.load(folder)
    layers = model.config.num_hidden_layers
    nll = model.nll(model.forward_from(model.hidden_before(2, sequences), layers), sequences)
    cut = Model.load(folder, max_tokens_in_flight=20)
    assert (cut.nll(cut.forward_from(cut.hidden_before(1, sequences), layers), sequences) == nll).all()
    first = 0
    for ids in filter(None, sequences):
        own = nll[first : first + len(ids) - 1]
        first += len(own)
        assert (model.nll(model.hidden_before(layers, [ids]), [ids]) == own).all()
        logits = torch.tensor(reference(folder, ids))[:-1].double()
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").numpy()
        assert np.abs(own - wanted).max() < 1e-4


@each_kind
@pytest.mark.parametrize("device", ["cpu", "cpu-stock"])
def test_generation_across_the_original_context(device: str, folder: Path) -> None:
    """The text is that of one forward pass over all of it, alone and beside texts of other lengths."""
    model, new = Model.load(folder, device=device), 12
    shared = tiny.ids(120, seed=3)
    prompts = [shared[:n] for n in (36, 37, 38, 45, 10, 110)] + [tiny.ids(n, seed=n) for n in (37, 60, 60, 1)]
    texts = model.generate(prompts, max_new_tokens=new, stop_tokens=[])
    for prompt, text in zip(prompts, texts, strict=True):
        logits = reference(folder, [*prompt, *text][:-1])[len(prompt) - 1 :]
        top = np.sort(logits)[:, -2:]
        assert ((logits.argmax(-1) == text) | (top[:, 1] - top[:, 0] < 1e-4)).all()
        assert model.generate(prompt, max_new_tokens=new, stop_tokens=[]) == text
    if device == "cpu":
        few = Model.load(folder, max_tokens_in_flight=16)
        assert few.generate(prompts, max_new_tokens=new, stop_tokens=[]) == texts
        drawn = {"max_new_tokens": new, "temperature": 1.0, "seed": 5, "stop_tokens": []}
        assert few.generate(prompts, **drawn) == model.generate(prompts, **drawn)


@each_kind
def test_generation_beyond_the_original_context_is_that_of_transformers(folder: Path) -> None:
    """Of `longrope` at any length on one side; `dynamic` changes with every token there, and ours does not."""
    model = Model.load(folder)
    lengths = (20, 60) if "longrope" in folder.parent.name else (20,)
    for length in lengths:
        ids = tiny.ids(length, seed=length)
        with torch.no_grad():
            out = fresh(folder).generate(
                torch.tensor([ids]), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        assert model.generate(ids, max_new_tokens=20, stop_tokens=[]) == out[0, length:].tolist()


@each_kind
def test_measured_beyond_the_original_context(folder: Path) -> None:
    model = Model.load(folder)
    assert len(model.measure_decode(100, 2)) == 2
    assert len(model.measure_prefill(100, 1)) == 1


@pytest.mark.parametrize("name", [name for name in NAMES if "gpt" not in name])
def test_a_converted_checkpoint_beyond_the_original_context(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", name)
    convert(folder, tmp_path / "converted", plan="mqa:all", sync=False)
    for length in LENGTHS[1:]:
        ids = tiny.ids(length, seed=length)
        ours = Model.load(tmp_path / "converted").logits(ids)
        assert_close(ours, reference(tmp_path / "converted", ids), f"{length} tokens")
        assert (ours == Model.load(folder, plan="mqa:all").logits(ids)).all()


@each_kind
def test_calibration_keeps_to_the_original_context(folder: Path, tmp_path: Path) -> None:
    """Layers are merged for the frequencies of the original context; statistics of other ones do not belong to them."""
    within = Calibration([tiny.ids(CONTEXT, seed=seed) for seed in range(4)])
    convert(folder, tmp_path / "within", plan="mqa:last1", method="closed-form", calibration=within, sync=False)
    refusal = f"calibration text of {CONTEXT + 1} tokens is too long: .* {CONTEXT} tokens"
    for sequential in (False, True):
        beyond = Calibration([tiny.ids(CONTEXT, seed=1), tiny.ids(CONTEXT + 1, seed=2)], sequential=sequential)
        with pytest.raises(ArgumentError, match=refusal):
            convert(folder, tmp_path / "out", plan="mqa:last1", method="closed-form", calibration=beyond, sync=False)
    assert not (tmp_path / "out").exists()


MALFORMED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "long_factor_too_short": ("llama", "4.0", {**LONGROPE, "long_factor": LONG[:3]}, "rope_scaling.long_factor"),
    "long_factor_too_long": ("llama", "4.0", {**LONGROPE, "long_factor": [*LONG, 1.0]}, "rope_scaling.long_factor"),
    "long_factor_missing": ("llama", "4.0", {"rope_type": "longrope", "short_factor": SHORT}, "rope_scaling.long_factor"),
    "long_factor_not_a_list": ("llama", "4.0", {**LONGROPE, "long_factor": 2.0}, "rope_scaling.long_factor"),
    "long_factor_zero": ("llama", "4.0", {**LONGROPE, "long_factor": [0.0, *LONG[1:]]}, "rope_scaling.long_factor"),
    "short_factor_of_text": ("llama", "4.0", {**LONGROPE, "short_factor": ["1"] * 4}, "rope_scaling.short_factor"),
    "no_attention_factor": (
        "llama", "4.0", {**LONGROPE, "factor": 4.0, "original_max_position_embeddings": 1}, "rope_scaling.attention_factor"),
    "factor_missing": ("llama", "4.0", {"rope_type": "dynamic"}, "rope_scaling.factor"),
    "factor_negative": ("llama", "4.0", {"rope_type": "dynamic", "factor": -1.0}, "rope_scaling.factor"),
    "factor_of_text": ("llama", "4.0", {"rope_type": "dynamic", "factor": "2"}, "rope_scaling.factor"),
    "factor_infinite": ("llama", "1e999", DYNAMIC, "config.json"),
    "factor_nan": ("llama", "NaN", DYNAMIC, "config.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_configuration_is_refused(case: str, tmp_path: Path) -> None:
    family, number, rope, named = MALFORMED[case]
    folder = tiny.save(tmp_path / "model", family)
    description = json.loads((folder / "config.json").read_text())
    description.pop("rope_parameters", None)
    text = json.dumps({**description, "rope_scaling": rope}, indent=1)
    (folder / "config.json").write_text(text.replace('"factor": 4.0', f'"factor": {number}'))
    with pytest.raises(MqadaptError, match=named.replace(".", r"\.")):
        Model.load(folder)


@pytest.mark.parametrize("field", ["rope_type", "type"])
def test_dynamic_of_heads_that_rotate_two_values_is_refused(field: str, tmp_path: Path) -> None:
    """transformers divides by dim - 2."""
    folder = tiny.save(tmp_path / "model", "llama", head_dim=2)
    description = json.loads((folder / "config.json").read_text())
    description.pop("rope_parameters", None)
    description["rope_scaling"] = {field: "dynamic", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(MqadaptError, match=rf"rope_scaling\.{field}.*rotates 2 values"):
        Model.load(folder)
