"""The forward pass on an NVIDIA GPU beside the kernels on the processor: needs a build with the cargo feature `cuda`.

Tolerance: f32 on both sides, sums in another order. The processor's pass is held to transformers elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import test_gpt
import tiny
from mqadapt_rs import ArgumentError, Calibration, Model, MqadaptError, convert

if TYPE_CHECKING:
    from pathlib import Path

DEVICE = "cuda:0"
FAMILIES = (*tiny.FAMILIES, *test_gpt.FAMILIES)
PLAN = [1, 6, 2]
SEQUENCES = [tiny.ids(length, seed=length) for length in (1, 7, 40, 150)]


@pytest.fixture(autouse=True, scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny.save(tmp_path_factory.mktemp("any"), "llama")
    try:
        Model.load(folder, device=DEVICE)
    except (ArgumentError, MqadaptError) as error:
        pytest.skip(f"no GPU, or a build without CUDA: {error}")


def save(folder: Path, family: str, **changes: Any) -> Path:
    return (test_gpt.save if family in test_gpt.FAMILIES else tiny.save)(folder, family, **changes)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_processor(family: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "source", family)
    for plan in ("keep", PLAN):
        cpu = Model.load(folder, plan=plan, precision="exact")
        gpu = Model.load(folder, plan=plan, device=DEVICE)
        for ids in SEQUENCES:
            assert_close(gpu.logits(ids), cpu.logits(ids))
        ids = SEQUENCES[-1]
        assert_close(gpu.logits_in_steps(ids, [40, 1, 1, 60]), cpu.logits(ids))
        for found, expected in zip(gpu.hidden_states(ids), cpu.hidden_states(ids), strict=True):
            assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_and_texts_are_those_of_the_processor(family: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "source", family)
    cpu = Model.load(folder, plan=PLAN, precision="exact")
    gpu = Model.load(folder, plan=PLAN, device=DEVICE)
    pairs = [(ids, tiny.ids(5, seed=9)) for ids in SEQUENCES]
    scores = zip(gpu.loglikelihood(pairs), cpu.loglikelihood(pairs), strict=True)
    assert all(abs(found[0] - expected[0]) < 1e-3 for found, expected in scores)
    text = [token for seed in range(8) for token in tiny.ids(100, seed=seed)]
    assert abs(gpu.perplexity(text, 100) / cpu.perplexity(text, 100) - 1) < 1e-4
    prompts = SEQUENCES[1:3]
    assert gpu.generate(prompts, max_new_tokens=12) == cpu.generate(prompts, max_new_tokens=12)
    assert gpu.kv_bytes_per_token == cpu.kv_bytes_per_token


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2", "gpt2"])
def test_half_precision_is_as_near_as_rounding_allows(family: str, dtype: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "source", family, dtype=dtype)
    exact = Model.load(folder, dtype="float32", precision="exact")
    gpu = Model.load(folder, device=DEVICE)
    expected, found = exact.logits(SEQUENCES[-1]), gpu.logits(SEQUENCES[-1])
    error = np.sqrt(np.square(found - expected).mean() / np.square(expected).mean())
    assert error < (0.03 if dtype == "bfloat16" else 0.004)


def test_an_overlay_is_the_converted_checkpoint(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "source", "qwen3")
    calibration = Calibration([tiny.ids(96, seed=seed) for seed in range(4)], target_context=[32, 96])
    convert(folder, tmp_path / "out", PLAN, "closed-form", calibration=calibration, sync=False)
    overlay = Model.load(folder, plan=PLAN, method="closed-form", calibration=calibration, device=DEVICE)
    converted = Model.load(tmp_path / "out", device=DEVICE)
    assert np.array_equal(overlay.logits(SEQUENCES[-1]), converted.logits(SEQUENCES[-1]))


def test_another_device_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "source", "llama")
    with pytest.raises(MqadaptError, match="cuda:9"):
        Model.load(folder, device="cuda:9")
    with pytest.raises(ArgumentError, match="int8"):
        Model.load(folder, device=DEVICE, kv="int8")
