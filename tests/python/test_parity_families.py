"""Our forward pass against transformers (eager attention), layer by layer, for tiny random models of every family.

f32 tolerance: both sides sum the same f32 products in another order. A sum of K terms is off by about sqrt(K) 2^-24 of its
size, 1e-6 for the K <= 96 here, and a layer passes that on to the next through norms and a softmax whose logits are of the
order of 10. `TOLERANCE` is ten times what the worst of these models shows, and a hundredth of what the smallest real mistake
(a wrong epsilon of a norm, RoPE off by one position) gives.

bf16 and f16 tolerance: against f32 arithmetic on the same rounded weights, we may not be further off than transformers
computing in that dtype by more than half: both are draws of rounding errors of one size.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import tiny
from mqadapt_rs import Model

TOLERANCE = 5e-5  # of the root mean square of what is compared

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPES: dict[str, dict[str, Any]] = {
    "mha": {},
    "gqa": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "mqa": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "wide_heads": {"head_dim": 24, "num_key_value_heads": 3},
    "narrow_heads": {"head_dim": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-3},
    "odd_sizes": {"hidden_size": 45, "intermediate_size": 65, "vocab_size": 131, "num_attention_heads": 5,
                  "num_key_value_heads": 5, "rope_theta": 1e6},
}  # fmt: skip
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.3, 2.0, 5.0], "long_factor": [2.0, 4.0, 8.0, 16.0]}
# what families with one set of frequencies for whole heads can have
ROPES: dict[str, dict[str, Any]] = {
    "rope_linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "rope_llama3": {"rope_scaling": LLAMA3, "num_key_value_heads": 2},
    "rope_dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "rope_yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "rope_yarn_mscale": {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.4,
                         "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False, "original_max_position_embeddings": 32}},
    "rope_longrope": {"rope_scaling": {**LONGROPE, "factor": 4.0, "original_max_position_embeddings": 128}},
}  # fmt: skip
BY_KIND = {"full_attention": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
           "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}  # fmt: skip
# shapes that only some families have
MORE: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
        "gelu": {"hidden_act": "gelu"},
        **ROPES,
    },
    "gemma": {"biases": {"attention_bias": True, "num_key_value_heads": 2}},
    "gemma2": {
        "no_caps": {"attn_logit_softcapping": None, "final_logit_softcapping": None, "hidden_activation": "silu"},
        "windows_elsewhere": {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
        "biases": {"attention_bias": True, "num_key_value_heads": 2},
    },
    "gemma3_text": {
        "final_cap": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 0.1},
        "pattern": {"layer_types": None, "sliding_window_pattern": 3, "sliding_window": 4},
        "ropes": {"rope_parameters": BY_KIND},
        "long": {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "num_key_value_heads": 2},
    },
    "granite": {
        "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
        "ones": {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 0.35},
    },
    "olmo2": {"biases": {"attention_bias": True, "num_key_value_heads": 2}},
    "olmo3": {"ropes": {"rope_parameters": BY_KIND}, "pattern": {"layer_types": None, "sliding_window": 4}},
    "phi3": {
        "window": {"sliding_window": 5, "num_key_value_heads": 2},
        "partial": {"partial_rotary_factor": 0.5, "num_key_value_heads": 3},
        "longrope": {"rope_scaling": LONGROPE, "max_position_embeddings": 512, "original_max_position_embeddings": 128},
        "longrope_partial": {
            "rope_parameters": {
                **LONGROPE,
                "short_factor": [1.0, 1.3],
                "long_factor": [2.0, 4.0],
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 128,
        },
    },
    "smollm3": {
        "interval": {"no_rope_layers": None, "no_rope_layer_interval": 2},
        "window": {"use_sliding_window": True, "sliding_window": 5},
        "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
        **ROPES,
    },
    "starcoder2": {
        "window": {"sliding_window": 5, "num_key_value_heads": 2},
        "untied": {"norm_epsilon": 1e-3, "tie_word_embeddings": False, "hidden_act": "gelu"},
        **{name: ROPES[name] for name in ("rope_dynamic", "rope_yarn", "rope_longrope")},
    },
    "mistral": {"window": {"sliding_window": 5, "num_key_value_heads": 2}, "no_window": {"sliding_window": None}},
    "qwen2": {"window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}},
    "qwen3": {
        "biases": {"attention_bias": True, "num_key_value_heads": 2},
        "window": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    },
}
PLAIN_ROPE = ("gemma", "mistral", "qwen2", "qwen3", "gemma2", "granite", "olmo2", "starcoder2")
CASES = [
    (family, shape, changes)
    for family in tiny.FAMILIES
    for shape, changes in (
        SHAPES | ({k: ROPES[k] for k in ("rope_linear", "rope_llama3")} if family in PLAIN_ROPE else {}) | MORE[family]
    ).items()
]
LENGTHS = [1, 2, 17, 128]


def assert_close(ours: np.ndarray, reference: np.ndarray, what: str) -> None:
    assert ours.shape == reference.shape, what
    off = float(np.abs(ours - reference).max() / np.sqrt(np.mean(reference.astype(np.float64) ** 2)))
    assert off <= TOLERANCE, f"{what}: off by {off:.1e} of the root mean square"


@pytest.mark.parametrize(("family", "changes"), [pytest.param(f, c, id=f"{f}-{s}") for f, s, c in CASES])
def test_every_layer(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", family, **changes)
    ours, reference = Model.load(folder), tiny.load(folder)
    for length in LENGTHS:
        ids = tiny.ids(length, reference.config.vocab_size, seed=length)
        with torch.no_grad():
            theirs = reference(torch.tensor([ids]), output_hidden_states=True)
        states = ours.hidden_states(ids)
        assert len(states) == len(theirs.hidden_states)
        for i, (own, other) in enumerate(zip(states, theirs.hidden_states, strict=True)):
            assert_close(own, other[0].numpy(), f"{length} tokens, before layer {i}")
        logits = ours.logits(ids)
        assert logits.dtype == np.float32
        assert_close(logits, theirs.logits[0].numpy(), f"{length} tokens, logits")


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("steps", [[1] * 39, [17, 1, 1, 20], [39, 1]], ids=["one_by_one", "pieces", "prefill_and_one"])
def test_through_the_cache(family: str, steps: list[int], tmp_path: Path) -> None:
    """A sequence in pieces gives what it gives at once: in ours, and in transformers with and without its cache."""
    window = {"sliding_window": 6} if family == "mistral" else {}
    folder = tiny.save(tmp_path / "model", family, num_key_value_heads=3, **window)
    reference = tiny.load(folder)
    ids = tiny.ids(40)
    pieces = Model.load(folder).logits_in_steps(ids, steps)
    assert_close(pieces, tiny.logits(reference, ids), "against transformers without a cache")
    with torch.no_grad():
        cache, parts, start = DynamicCache(config=reference.config), [], 0
        # transformers 5.40 has another name for it
        named = inspect.signature(type(reference).forward).parameters
        kwargs = {"cache" if "cache" in named else "past_key_values": cache}
        for step in [*steps, len(ids) - sum(steps)]:
            if step:
                out = reference(torch.tensor([ids[start : start + step]]), use_cache=True, **kwargs)
                start += step
                parts.append(out.logits[0].numpy())
    assert_close(pieces, np.concatenate(parts), "against transformers with its cache")


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("plan", [[6, 2, 1], [1, 6, 3]], ids=str)
@pytest.mark.parametrize("method", ["mean", "first"])
def test_layers_that_differ(family: str, plan: list[int], method: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", family)
    reference = tiny.convert(tiny.load(folder), plan, method)
    ids = tiny.ids(50)
    model = Model.load(folder, plan=plan, method=method)
    assert model.config.num_key_value_heads == plan
    assert_close(model.logits(ids), tiny.logits(reference, ids), "logits")
    assert_close(model.logits_in_steps(ids, [30] + [1] * 20), tiny.logits(reference, ids), "logits through the cache")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_checkpoint_of_another_tool(family: str, tmp_path: Path) -> None:
    """`per_layer_config` with keys and an order that are not ours; then converted once more."""
    source = tiny.model(family)
    folder = tiny.save_mixed(tmp_path / "mixed", source, [2, 6, 3])
    ids = tiny.ids(30)
    reference = tiny.convert(source, [2, 6, 3], "mean")
    assert_close(Model.load(folder).logits(ids), tiny.logits(reference, ids), "logits")
    # the mean of means of equal groups is the mean
    reference = tiny.convert(reference, [1, 6, 3], "mean")
    assert_close(Model.load(folder, plan=[1, 6, 3]).logits(ids), tiny.logits(reference, ids), "logits once more")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_many_shards(family: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", family, max_shard_size="40KB", num_key_value_heads=2)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    ids = tiny.ids(20)
    assert_close(Model.load(folder).logits(ids), tiny.logits(tiny.load(folder), ids), "logits")


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("length", [1, 100])
def test_half_precision(family: str, dtype: str, length: int, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", family, dtype=dtype, num_key_value_heads=2)
    ids = tiny.ids(length)
    exact = tiny.logits(tiny.load(folder), ids)  # f32 arithmetic on the rounded weights
    if family in tiny.GEMMAS:
        # the embedding's scale is rounded to the dtype of the weights, which f32 arithmetic on them would not do
        scaled = tiny.load(folder)
        ratio = float(torch.tensor(48**0.5).to(tiny.DTYPES[dtype])) / 48**0.5
        scaled.model.embed_tokens.register_forward_hook(lambda _m, _i, out: out * ratio)
        exact = tiny.logits(scaled, ids)
    theirs = tiny.logits(tiny.load(folder, tiny.DTYPES[dtype]), ids)

    def off(logits: np.ndarray) -> float:
        return float(np.sqrt(np.mean((logits - exact) ** 2) / np.mean(exact**2)))

    model = Model.load(folder)
    assert model.dtype == dtype
    for logits in (model.logits(ids), model.logits_in_steps(ids, [1] * (length - 1))):
        assert off(logits) <= 1.5 * off(theirs), f"ours {off(logits):.2e}, transformers {off(theirs):.2e}"


@pytest.mark.parametrize("stored", ["bfloat16", "float32"])
def test_computing_in_another_dtype_than_stored(stored: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "llama", dtype=stored)
    ids = tiny.ids(30)
    widened = Model.load(folder, dtype="float32")
    assert widened.dtype == "float32"
    assert_close(widened.logits(ids), tiny.logits(tiny.load(folder), ids), "logits")


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_generation(family: str, tmp_path: Path) -> None:
    window = {"sliding_window": 8} if family == "mistral" else {}
    folder = tiny.save(tmp_path / "model", family, num_key_value_heads=2, **window)
    reference = tiny.load(folder)
    model = Model.load(folder)
    prompts = [tiny.ids(n, seed=n) for n in (1, 7, 30)]
    wanted = []
    for prompt in prompts:
        with torch.no_grad():
            out = reference.generate(
                torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
            )
        wanted.append(out[0, len(prompt) :].tolist())
    assert [model.generate(prompt, max_new_tokens=40, stop_tokens=[]) for prompt in prompts] == wanted
    assert model.generate(prompts, max_new_tokens=40, stop_tokens=[]) == wanted  # side by side


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_loglikelihood(family: str, tmp_path: Path) -> None:
    """Requests that share contexts, nest in each other and repeat; each against its own forward pass in transformers."""
    folder = tiny.save(tmp_path / "model", family, num_key_value_heads=2)
    reference, model = tiny.load(folder), Model.load(folder)
    shared = tiny.ids(40, seed=1)
    greedy = model.generate(shared, max_new_tokens=3, stop_tokens=[])
    requests = [(shared, tiny.ids(n, seed=n)) for n in (1, 1, 2, 9)]
    requests += [
        (shared[:20], shared[20:]),
        (shared[:1], shared[1:5]),
        (shared, greedy),
        (shared + greedy[:1], greedy[1:]),
    ]
    requests += [(tiny.ids(3, seed=9), tiny.ids(60, seed=8)), requests[0]]
    answers = model.loglikelihood(requests)
    assert len(answers) == len(requests)
    for (context, continuation), (score, is_greedy) in zip(requests, answers, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([context + continuation[:-1]])).logits[0, len(context) - 1 :].double()
        wanted = logits.log_softmax(-1)[range(len(continuation)), continuation].sum().item()
        # TOLERANCE on each logit of size 1 to 10
        assert score == pytest.approx(wanted, abs=1e-4 * len(continuation))
        assert is_greedy == (logits.argmax(-1).tolist() == continuation)
    assert answers[6][1] and answers[7][1]


def test_perplexity(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", "llama", num_key_value_heads=2)
    reference, model = tiny.load(folder), Model.load(folder)
    ids = tiny.ids(110)
    windows = torch.tensor(ids[:96]).reshape(3, 32)
    with torch.no_grad():
        logits = reference(windows).logits[:, :-1].double()
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp().item()
    assert model.perplexity(ids, context=32) == pytest.approx(wanted, rel=1e-5)
