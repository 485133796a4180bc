"""Trained models: stories260K (llama2.c) and SmolLM2-135M-Instruct (imported from its GGUF), against transformers and
against figures that others measured."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

import tiny
from mqadapt_rs import Model, convert
from mqadapt_rs.lm_eval import MqadaptLM, evaluate
from real import once

MIXED = "mqa:alternate5"  # five of thirty layers


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 in f32, imported by us."""
    import models

    return once(
        tmp_path_factory, "smollm2", lambda out: convert(models.smollm2_gguf(), out, plan="keep", dtype="float32")
    )


@pytest.fixture(scope="session")
def smollm2_mixed(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with five layers at one K/V head."""
    return once(tmp_path_factory, "smollm2-mixed", lambda out: convert(smollm2, out, plan=MIXED))


@pytest.fixture(scope="session")
def stories(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as a Hugging Face folder: 5 layers, 8 query and 4 K/V heads."""
    binary = shared / "data/checkpoints/stories260K/stories260K.bin"
    return once(tmp_path_factory, "stories", lambda out: tiny.save_stories(binary, out))


@pytest.mark.parametrize("device", ["cpu", "cpu-stock"])
def test_stories_continue_as_written(device: str, stories: Path, shared: Path) -> None:
    folder = shared / "data/checkpoints/stories260K"
    wanted = (folder / "greedy.txt").read_text().rstrip("\n")
    model = Model.load(stories, device=device)
    assert model.config.num_key_value_heads == [4] * 5
    text = tiny.stories_decode(folder / "tok512.bin", model.generate([1], max_new_tokens=257, stop_tokens=[]))
    assert len(wanted) > 500 and text.startswith(wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stories_under_a_plan(dtype: str, stories: Path, tmp_path: Path) -> None:
    convert(stories, tmp_path / "out", plan="gqa2:1,3;mqa:4", dtype=dtype)
    ids = tiny.ids(200, vocab_size=512)
    reference = tiny.convert(tiny.load(stories), [4, 2, 4, 2, 1], "mean")
    ours, wanted = Model.load(tmp_path / "out").logits(ids), tiny.logits(reference, ids)
    # f32: another order of summation; bf16: 8 bits of weights through five layers, 0.4 % each
    tolerance = {"float32": 5e-5, "bfloat16": 0.03}[dtype]
    assert np.sqrt(np.mean((ours - wanted) ** 2) / np.mean(wanted**2)) < tolerance


def wikitext(shared: Path) -> str:
    with gzip.open(shared / "data/text/wikitext2_raw_valid_documents.jsonl.gz", "rt") as lines:
        return "".join(json.loads(line)["page"] for line in lines)


def clean(text: str) -> str:
    """WikiText's tokenisation undone, as the prototype behind the table did it."""
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in [",", ".", ";", ":", ")", "'s", "?", "!"]:
        text = text.replace(" " + mark, mark)
    return text.replace("( ", "(")


@pytest.fixture(scope="session")
def smollm2_ids(smollm2: Path, shared: Path) -> list[int]:
    """The cleaned WikiText-2 text in SmolLM2's tokens."""
    return list(AutoTokenizer.from_pretrained(smollm2)(clean(wikitext(shared))).input_ids)


@pytest.mark.slow
def test_smollm2_every_layer(smollm2: Path, smollm2_ids: list[int]) -> None:
    """f32. Sums have up to 1536 terms and pass through 30 layers, and some channels of the residual stream are a thousand
    times the others: 1e-4 of the root mean square (measured: see the assertion's message when it fails)."""
    ids = smollm2_ids[:256]
    ours, reference = Model.load(smollm2), tiny.load(smollm2)
    with torch.no_grad():
        theirs = reference(torch.tensor([ids]), output_hidden_states=True)
    for i, (own, other) in enumerate(zip(ours.hidden_states(ids), theirs.hidden_states, strict=True)):
        assert off(own, other[0].numpy()) < 1e-4, f"before layer {i}: {off(own, other[0].numpy()):.1e}"
    logits = theirs.logits[0].numpy()
    assert off(ours.logits(ids), logits) < 1e-4
    assert off(ours.logits_in_steps(ids, [200] + [1] * 56), logits) < 1e-4


def off(ours: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square of the difference, of that of what is wanted."""
    return float(np.sqrt(np.mean((ours - wanted).astype(np.float64) ** 2) / np.mean(wanted.astype(np.float64) ** 2)))


@pytest.mark.slow
def test_smollm2_in_bf16(smollm2: Path, smollm2_ids: list[int]) -> None:
    """As near to f32 arithmetic on the same bf16 weights as transformers in bf16 is, give or take half."""
    ids = smollm2_ids[:256]
    model = tiny.load(smollm2, torch.bfloat16)
    theirs = tiny.logits(model, ids)
    exact = tiny.logits(model.float(), ids)
    ours = Model.load(smollm2, dtype="bfloat16")
    for logits in (ours.logits(ids), ours.logits_in_steps(ids, [250] + [1] * 6)):
        assert off(logits, exact) <= 1.5 * off(theirs, exact), (
            f"{off(logits, exact):.2e} against {off(theirs, exact):.2e}"
        )


@pytest.mark.slow
def test_smollm2_mixed_in_transformers(smollm2_mixed: Path, smollm2_ids: list[int]) -> None:
    ids = smollm2_ids[:128]
    logits = tiny.logits(tiny.load(smollm2_mixed, trust_remote_code=True), ids)
    assert off(Model.load(smollm2_mixed).logits(ids), logits) < 1e-4


# What merging costs, against perplexities that a prototype in PyTorch measured (bf16, 16 windows of 512 tokens).
#
# `mean`: on these very windows, the first of the second half of the cleaned WikiText-2 validation text, base 29.95.
# `first`: on another slice that we do not have, base 32.40; where few layers change, the slice moves the increase by more
# than the 15 % allowed, so that those are left to the comparison with PyTorch below.

MEAN = {"mqa:20": 32.63, "mqa:alternate5": 45.48, "mqa:last8": 101.70, "mqa:alternate15": 865.0, "mqa:all": 19817.0}
FIRST = {"mqa:last8": 482.65, "mqa:alternate15": 137559.0, "mqa:all": 1.8e6}


@pytest.fixture(scope="session")
def windows(smollm2_ids: list[int]) -> list[int]:
    return smollm2_ids[len(smollm2_ids) // 2 :][: 16 * 512]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_what_merging_costs(smollm2: Path, windows: list[int]) -> None:
    source = Model.load(smollm2, dtype="bfloat16")
    base = source.perplexity(windows, context=512)
    assert base == pytest.approx(29.95, rel=0.01)

    def increase(plan: str, method: str) -> float:
        return math.log(source.with_plan(plan, method).perplexity(windows, context=512) / base)

    # measured: within 0.5 %
    assert {plan: increase(plan, "mean") for plan in MEAN} == pytest.approx(
        {plan: math.log(found / 29.95) for plan, found in MEAN.items()}, rel=0.02
    )
    assert {plan: increase(plan, "first") for plan in FIRST} == pytest.approx(
        {plan: math.log(found / 32.40) for plan, found in FIRST.items()}, rel=0.15
    )


@pytest.mark.slow
def test_what_8_bit_weights_cost(smollm2: Path, windows: list[int]) -> None:
    """One percent of perplexity (docs/performance.md), and twice that at most; activations are what it comes from."""
    stored, fast, exact = (
        Model.load(smollm2, dtype="bfloat16", weights=weights, precision=precision).perplexity(windows[:4096], 512)
        for weights, precision in (("stored", "fast"), ("int8", "fast"), ("int8", "exact"))
    )
    assert 1.0 < fast / stored < 1.02
    assert 0.99 < exact / stored < 1.01


@pytest.mark.parametrize(
    ("plan", "method"),
    [("mqa:0", "mean"), ("mqa:0", "first"), ("mqa:20", "first"), ("mqa:alternate5", "first"), ("mqa:last8", "mean")],
)
def test_perplexity_of_an_independent_conversion(plan: str, method: str, smollm2: Path, windows: list[int]) -> None:
    """Converted in PyTorch, run by transformers on the same windows: equal within 0.5 %."""
    ours = Model.load(smollm2, plan=plan, method=method)
    reference = tiny.convert(tiny.load(smollm2, attn_implementation="sdpa"), ours.config.num_key_value_heads, method)
    total = 0.0
    with torch.no_grad():
        for window in torch.tensor(windows[:1024]).reshape(2, 512):
            total += float(reference(window[None], labels=window[None]).loss)
    assert ours.perplexity(windows, context=512, windows=2) == pytest.approx(math.exp(total / 2), rel=5e-3)


# HellaSwag, 200 documents.


def hellaswag(lm: Any, shared: Path) -> tuple[dict[str, float], list[tuple[float, bool]]]:
    results = evaluate(lm, ["hellaswag_indomain"], include_path=shared / "tasks", limit=80, log_samples=True)
    metrics = {key: value for key, value in results["results"]["hellaswag_indomain"].items() if key.startswith("acc")}
    samples = sorted(results["samples"]["hellaswag_indomain"], key=lambda sample: sample["doc_id"])
    return metrics, [answer for sample in samples for [answer] in sample["resps"]]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("converted", [False, True], ids=["source", "mixed"])
def test_hellaswag_equals_hf(
    converted: bool, smollm2: Path, smollm2_mixed: Path, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same accuracies, every log-likelihood within 1e-3: f32 on both sides, up to 60 scored tokens.

    Against f64 arithmetic ours is off by 2e-5 and `hf` by 7e-5 (root mean square of 24 requests, eleven layers merged); in a
    model as damaged as that one, a few of `hf`'s answers leave the 1e-3, so the plan here is a milder one.
    """
    monkeypatch.chdir(Path(__file__).parents[2])  # the task names its data from there
    folder = smollm2_mixed if converted else smollm2
    metrics, answers = hellaswag(MqadaptLM(str(folder)), shared)
    assert len(answers) == 320
    reference = HFLM(str(folder), device="cpu", dtype="float32", batch_size=16, trust_remote_code=True)
    wanted_metrics, wanted = hellaswag(reference, shared)
    assert metrics == wanted_metrics
    assert max(abs(own[0] - other[0]) for own, other in zip(answers, wanted, strict=True)) < 1e-3
    assert [own[1] for own in answers] == [other[1] for other in wanted]
    if converted:
        overlay_metrics, overlay = hellaswag(MqadaptLM(str(smollm2), plan=MIXED), shared)
        assert (overlay_metrics, overlay) == (metrics, answers)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_and_stock_path_agree(dtype: str, smollm2: Path, shared: Path) -> None:
    """Our kernels against the same forward pass in candle's own operations, 500 requests of HellaSwag.

    f32: 1e-3, the tolerance of the issue. bf16: the stock path computes in f32 on the bf16 weights, ours rounds what it
    multiplies to bf16 in prefill: 8 bits, so 0.2 % of a log-likelihood of -20 to -200 a request; 1 % is allowed.
    """
    with gzip.open(shared / "data/eval/hellaswag_indomain.jsonl.gz", "rt") as lines:
        documents = [json.loads(line) for _, line in zip(range(125), lines, strict=False)]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    requests, lengths = [], []
    for document in documents:
        context = tokenizer(document["ctx"]).input_ids
        for ending in document["endings"]:
            requests.append((context, tokenizer(" " + ending).input_ids))
            lengths.append(len(ending))
    assert len(requests) == 500
    fused, stock = (
        np.array([score for score, _ in Model.load(smollm2, dtype=dtype, device=device).loglikelihood(requests)])
        for device in ("cpu", "cpu-stock")
    )
    if dtype == "float32":
        assert np.abs(fused - stock).max() < 1e-3
    else:
        assert (np.abs(fused - stock) < 0.01 * np.abs(stock) + 0.05).all(), np.abs(fused - stock).max()
    gold = np.array([int(document["label"]) for document in documents])

    def acc_norm(scores: np.ndarray) -> int:
        return int(((scores / lengths).reshape(-1, 4).argmax(1) == gold).sum())

    # f32: not one answer; bf16: one in a hundred may tip over
    assert abs(acc_norm(fused) - acc_norm(stock)) <= {"float32": 0, "bfloat16": 1}[dtype]
