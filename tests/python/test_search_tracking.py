"""Weights & Biases, offline."""

from __future__ import annotations

from pathlib import Path

import pytest

from mqadapt_rs.search import Options, conduct
from mqadapt_rs.tracking import tracked
from search_fakes import SPACE, FakeSpec


def test_a_run_holds_evaluations_and_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="Weights & Biases is not installed (extra 'wandb')")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with tracked("project", name="a search", config={"strategy": "sensitivity"}, folder=tmp_path) as run:
        assert run is not None
        result = conduct(
            FakeSpec(noise=0.1), SPACE, "sensitivity", Options(), tmp_path,
            watcher=lambda evaluation, *_: run.evaluation(evaluation, "kl"),
        )  # fmt: skip
        run.result(result, bytes_on_disk=1234)
        summary = dict(run._run.summary)
    assert summary["bytes_on_disk"] == 1234
    assert result.winner is not None
    assert list(summary["best_num_key_value_heads"]) == list(result.winner.plan)
    assert summary["best_kv_bytes_per_token"] == result.winner.kv_bytes
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert log.stat().st_size > 500
    assert list(tmp_path.glob("wandb/offline-run-*/files/best.plan.json"))


def test_without_a_project_nothing_is_imported(tmp_path: Path) -> None:
    with tracked(None, name="", config={}, folder=tmp_path) as run:
        assert run is None
    assert not list(tmp_path.iterdir())
