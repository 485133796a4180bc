"""`closed-form` in layers with q/k norms: the converted model is nearer to the original than mean-pooled keys are, and loads
in transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import tiny
from mqadapt_rs import Calibration, Model, convert

if TYPE_CHECKING:
    from pathlib import Path

TEXT = [tiny.ids(128, seed=seed) for seed in range(1, 17)]
PROBES = [tiny.ids(120, seed=seed) for seed in (101, 102, 103)]
# fewer dims than the hidden state has, and attention that is far from uniform
SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


def divergence(reference: Model, other: Model) -> float:
    """Mean of `KL(reference || other)` of the next token over the probes, in nats."""
    parts = []
    for probe in PROBES:
        p, q = (torch.tensor(model.logits(probe)).double().log_softmax(-1) for model in (reference, other))
        parts.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return sum(parts) / len(parts)


@pytest.mark.parametrize("sequential", [False, True])
def test_norms_leave_less_than_half_of_the_damage_of_the_mean(sequential: bool, tmp_path: Path) -> None:
    tiny.save(tmp_path / "src", "qwen3", **SHAPE)
    source = Model.load(tmp_path / "src", dtype="float32", precision="exact")
    calibration = Calibration(TEXT, target_context=[128], sequential=sequential)
    mean = source.with_plan("mqa:all", "mean")
    merged = source.with_plan("mqa:all", "closed-form", calibration=calibration)
    assert divergence(source, merged) < 0.5 * divergence(source, mean)


def test_the_manifest_compares_keys_and_transformers_loads_them(tmp_path: Path) -> None:
    tiny.save(tmp_path / "src", "qwen3", **SHAPE)
    calibration = Calibration(TEXT, target_context=[128])
    report = convert(tmp_path / "src", tmp_path / "dst", "mqa:all", "closed-form", calibration=calibration, sync=False)
    for layer in report.manifest["layers"].values():
        compared = layer["compared_output_error"]
        assert compared["searched_keys"] < compared["mean_keys"] < compared["mean"]
        assert layer["fast_pairs"] is not None
    expected = tiny.logits(tiny.load(tmp_path / "dst"), PROBES[0])
    found = Model.load(tmp_path / "dst", dtype="float32", precision="exact").logits(PROBES[0])
    # f32, three layers with activations of order 1
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.abs(expected).max())
