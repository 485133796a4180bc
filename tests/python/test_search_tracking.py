"""Weights & Biases, offline."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from mqadapt_rs import convert, inspect
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
    assert list(summary["best_num_key_value_heads"]) == result.plan.num_key_value_heads
    assert summary["best_kv_bytes_per_token"] == result.winner.kv_bytes
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # the process that writes it may do so after the run was finished: at the latest when this one ends
    patience = time.monotonic() + 120
    while log.stat().st_size <= 500 and time.monotonic() < patience:
        time.sleep(0.1)
    assert log.stat().st_size > 500
    assert list(tmp_path.glob("wandb/offline-run-*/files/best.plan.json"))


def test_an_evaluation_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="Weights & Biases is not installed (extra 'wandb')")
    from typer.testing import CliRunner

    import tiny
    from mqadapt_rs.cli.app import app

    model, tasks = tmp_path / "model", tmp_path / "tasks"
    vocab_size = tiny.save_tokenizer(model, "yes no maybe: does it rain? the sun shines. " * 30)
    tiny.save(model, "llama", vocab_size=vocab_size)
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text('{"q": "does it rain?", "g": 1}\n{"q": "the sun shines?", "g": 0}\n')
    (tasks / "task.yaml").write_text(
        "task: tiny_rain\ndataset_path: json\noutput_type: multiple_choice\nvalidation_split: validation\n"
        f"dataset_kwargs: {{data_files: {{validation: {tasks / 'rows.jsonl'}}}}}\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: ['yes', 'no']\ndoc_to_target: g\nmetric_list: [{metric: acc}]\n"
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    seen: dict[str, object] = {}
    finish = wandb.sdk.wandb_run.Run.finish

    def note(run: object, *args: object, **more: object) -> None:
        seen.update(run.summary)  # type: ignore[attr-defined]
        finish(run, *args, **more)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "finish", note)
    words = ["eval", str(model), "--plan", "mqa:last1", "--tasks", "tiny_rain", "--include-path", str(tasks)]
    outcome = CliRunner().invoke(app, [*words, "--wandb", "project", "--json"], catch_exceptions=False)
    assert outcome.exit_code == 0
    assert seen["tiny_rain/acc"] == json.loads(outcome.stdout)["results"]["tiny_rain"]["acc,none"]
    assert list(seen["num_key_value_heads"]) == [6, 6, 1]  # type: ignore[call-overload]
    assert seen["kv_bytes_per_token"] == 2 * 13 * 8 * 4
    converted = tmp_path / "converted"
    convert(model, converted, plan="mqa:last1")
    assert seen["bytes_on_disk"] == inspect(converted)["bytes"]


def test_without_a_project_nothing_is_imported(tmp_path: Path) -> None:
    with tracked(None, name="", config={}, folder=tmp_path) as run:
        assert run is None
    assert not list(tmp_path.iterdir())
