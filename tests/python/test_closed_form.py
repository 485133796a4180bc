"""`closed-form` and `prune` from calibration text: conversion, overlay and command line agree, and heads that are equal merge
without loss."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny
from mqadapt_rs import ArgumentError, Calibration, Model, MqadaptError, convert
from mqadapt_rs.calibration import draw_windows
from mqadapt_rs.cli.app import app

if TYPE_CHECKING:
    from pathlib import Path

TEXT = [tiny.ids(96, seed=1), tiny.ids(96, seed=2), tiny.ids(50, seed=3)]
PROBE = tiny.ids(60, seed=9)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_repeated_heads_merge_back_and_load_in_transformers(family: str, tmp_path: Path) -> None:
    heads = 2 if family != "gemma" else 1
    small = tiny.model(family, num_key_value_heads=heads)
    tiny.expand(small, 6).save_pretrained(tmp_path / "large")
    calibration = Calibration(TEXT, target_context=[32, 96], sequential=family == "mistral")
    plan = [heads] * 3
    convert(tmp_path / "large", tmp_path / "small", plan, "closed-form", calibration=calibration, sync=False)
    expected = tiny.logits(small, PROBE)
    found = tiny.logits(tiny.load(tmp_path / "small"), PROBE)
    # f32 weights, three layers with activations of order 1
    np.testing.assert_allclose(found, expected, atol=3e-3 * np.abs(expected).max())
    overlay = Model.load(tmp_path / "large", plan=plan, method="closed-form", calibration=calibration)
    converted = Model.load(tmp_path / "small")
    assert np.array_equal(overlay.logits(PROBE), converted.logits(PROBE))


def test_the_manifest_says_what_was_done(tmp_path: Path) -> None:
    tiny.save(tmp_path / "src", "qwen3", dtype="bfloat16")
    stats = tmp_path / "stats"
    calibration = Calibration(TEXT, target_context=[32, 96], stats=stats)
    report = convert(tmp_path / "src", tmp_path / "dst", "mqa:0,2", "closed-form", calibration=calibration, sync=False)
    manifest = report.manifest
    assert manifest["method"] == "closed-form"
    assert manifest["options"]["calibration_tokens"] == 242
    assert sorted(manifest["layers"]) == ["0", "2"]
    assert {"searched_keys", "mean_keys", "mean"} <= set(manifest["layers"]["0"]["compared_output_error"])
    assert manifest["layers"]["2"]["predicted_output_error"] > 0
    # merged again from the file, without the text
    saved = Calibration(target_context=[32, 96], stats=stats)
    convert(tmp_path / "src", tmp_path / "again", "mqa:0,2", "closed-form", calibration=saved, sync=False)
    assert (tmp_path / "dst/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()
    pruned = convert(tmp_path / "src", tmp_path / "pruned", "gqa2:1", "prune", calibration=saved, sync=False).manifest
    kept = pruned["layers"]["1"]["kept_heads"]
    assert len(kept) == 2
    assert kept[0] < 3 <= kept[1]


def test_windows_of_several_lengths_convert_and_are_in_the_manifest(tmp_path: Path) -> None:
    tiny.save(tmp_path / "src", "llama")
    stats = tmp_path / "stats"
    windows = draw_windows(tiny.ids(2000, seed=4), tokens=800, context=(40, 100), seed=0)
    mixed = Calibration(windows, target_context=[40, 100], stats=stats)

    def manifest(name: str, calibration: Calibration) -> dict[str, Any]:
        report = convert(
            tmp_path / "src", tmp_path / name, "mqa:all", "closed-form", calibration=calibration, sync=False
        )
        return report.manifest

    written = manifest("dst", mixed)
    assert written["options"]["calibration_context"] == [40, 100]
    assert written["options"]["target_context"] == [40, 100]
    assert written["options"]["calibration_tokens"] == 800
    # the statistics know the windows: their contexts are the default, and no longer one is measured with them
    saved = Calibration(stats=stats)
    assert (saved.context, saved.target_context) == ([40, 100], [100])
    assert manifest("saved", saved)["options"]["calibration_context"] == [40, 100]
    again = manifest("again", Calibration(stats=stats, target_context=[40, 100]))
    assert again["layers"] == written["layers"]
    with pytest.raises(ArgumentError, match=r"target_context is 101 tokens.* has 100"):
        manifest("longer", Calibration(stats=stats, target_context=[40, 101]))
    assert not (tmp_path / "longer").exists()


def test_what_does_not_fit_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    tiny.save(tmp_path / "src", "llama")
    tiny.save(tmp_path / "other", "llama", seed=5)
    stats = tmp_path / "stats"
    calibration = Calibration(TEXT, target_context=[32], stats=stats)
    with pytest.raises(ArgumentError, match=r"needs|merges from text"):
        convert(tmp_path / "src", tmp_path / "dst", "mqa:all", "closed-form")
    with pytest.raises(ArgumentError, match="merges from text"):
        Model.load(tmp_path / "src", plan="mqa:all", method="prune")
    Model.load(tmp_path / "src", plan="mqa:1", method="prune", calibration=calibration)
    with pytest.raises(MqadaptError, match="collect them again"):
        convert(tmp_path / "other", tmp_path / "dst", "mqa:1", "closed-form", calibration=calibration)
    longer = Calibration([*TEXT, PROBE], target_context=[32], stats=stats)
    with pytest.raises(ArgumentError, match="another text"):
        convert(tmp_path / "src", tmp_path / "dst", "mqa:1", "closed-form", calibration=longer)
    with pytest.raises(ArgumentError, match="no tokens"):
        convert(tmp_path / "src", tmp_path / "dst", "mqa:1", "closed-form", calibration=Calibration())
    stats.write_bytes(stats.read_bytes()[:-1])
    with pytest.raises(MqadaptError, match="stats"):
        convert(tmp_path / "src", tmp_path / "dst", "mqa:1", "closed-form", calibration=calibration)
    assert not (tmp_path / "dst").exists()


def test_statistics_do_not_follow_links(tmp_path: Path) -> None:
    tiny.save(tmp_path / "source", "llama")
    victim, stats = tmp_path / "victim", tmp_path / "stats"
    victim.write_text("years of work")
    (tmp_path / "stats.mqadapt-partial").symlink_to(victim)

    calibration = Calibration(TEXT, target_context=[32], stats=stats)
    source = tmp_path / "source"
    convert(source, tmp_path / "one", "mqa:all", "closed-form", calibration=calibration, sync=False)
    assert stats.is_file() and not stats.is_symlink()
    stats.unlink()
    stats.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError):
        convert(source, tmp_path / "two", "mqa:all", "closed-form", calibration=calibration, sync=False)
    assert victim.read_text() == "years of work"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"source", "victim", "stats", "stats.mqadapt-partial", "one"}


def test_the_command_line_takes_the_same(tmp_path: Path) -> None:
    vocab_size = tiny.save_tokenizer(tmp_path / "src", "the quick brown fox jumps over the lazy dog " * 20)
    tiny.save(tmp_path / "src", "llama", vocab_size=vocab_size)
    text = tmp_path / "text.txt"
    text.write_text("the lazy dog jumps over the quick brown fox " * 60, encoding="utf-8")
    shared = ["--plan", "mqa:all", "--method", "closed-form", "--calibration", str(text), "--sequential"]
    shared += ["--calibration-context", "24,40", "--target-context", "20,40"]
    runner = CliRunner()
    with pytest.warns(UserWarning, match="are few"):
        run = runner.invoke(app, ["convert", str(tmp_path / "src"), str(tmp_path / "dst"), *shared, "--json"])
    assert run.exit_code == 0, run.output
    options = json.loads(run.stdout)["options"]
    assert (options["sequential"], options["calibration_context"], options["target_context"]) == (
        True,
        [24, 40],
        [20, 40],
    )
    measure = ["--text", str(text), "--context", "40", "--json"]
    with pytest.warns(UserWarning, match="are few"):
        overlay = runner.invoke(app, ["perplexity", str(tmp_path / "src"), *shared, *measure])
    converted = runner.invoke(app, ["perplexity", str(tmp_path / "dst"), *measure])
    assert json.loads(overlay.stdout)["perplexity"] == json.loads(converted.stdout)["perplexity"]
    written = ["--prompt", "the lazy dog", "--max-new-tokens", "4", "--json"]
    with pytest.warns(UserWarning, match="are few"):
        here = runner.invoke(app, ["generate", str(tmp_path / "src"), *shared, *written])
    there = runner.invoke(app, ["generate", str(tmp_path / "dst"), *written])
    assert json.loads(here.stdout)["ids"] == json.loads(there.stdout)["ids"]


def test_the_command_line_refuses_contexts_that_cannot_be(tmp_path: Path) -> None:
    vocab_size = tiny.save_tokenizer(tmp_path / "src", "the quick brown fox jumps over the lazy dog " * 20)
    tiny.save(tmp_path / "src", "llama", vocab_size=vocab_size)
    text = tmp_path / "text.txt"
    text.write_text("the lazy dog jumps over the quick brown fox " * 60, encoding="utf-8")

    def refusal(*contexts: str) -> str:
        words = ["--plan", "mqa:0", "--method", "closed-form", "--calibration", str(text), *contexts]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the text is short
            run = CliRunner().invoke(app, ["convert", str(tmp_path / "src"), str(tmp_path / "dst"), *words])
        assert isinstance(run.exception, ArgumentError)
        return str(run.exception)

    message = refusal("--calibration-context", "24,40", "--target-context", "2048")
    assert "2048 tokens" in message
    assert "--calibration-context" in message
    assert "numbers separated by commas" in refusal("--calibration-context", "24;40")
    assert "at least 2" in refusal("--calibration-context", "24,1")
    assert "less than one window of 5000" in refusal("--calibration-context", "5000")
    assert not (tmp_path / "dst").exists()


def test_gradient_steps_bring_the_converted_stream_nearer(tmp_path: Path) -> None:
    tiny.save(tmp_path / "src", "qwen2")

    def errors(**options: int) -> list[float]:
        calibration = Calibration(TEXT, target_context=[96], sequential=True, **options)
        report = convert(
            tmp_path / "src", tmp_path / "dst", "mqa:all", "closed-form",
            calibration=calibration, sync=False, overwrite=True,
        )  # fmt: skip
        manifest = report.manifest
        assert manifest["options"].get("refine") == options.get("refine")
        return [layer["output_error_after_refit"] for layer in manifest["layers"].values()]

    # the first layer alone: what follows reads another stream
    assert errors(refine=200)[0] < 0.98 * errors()[0]


def test_a_method_refuses_what_it_does_nothing_with(tmp_path: Path) -> None:
    tiny.save(tmp_path / "src", "llama")
    cases = [
        ("mean", Calibration(TEXT), "method 'mean' reads no text"),
        ("prune", Calibration(TEXT, sequential=True), "leave it out, or choose closed-form"),
        ("prune", Calibration(TEXT, refine=3), "leave it out, or choose closed-form"),
    ]
    for method, calibration, message in cases:
        with pytest.raises(ArgumentError, match=message):
            convert(tmp_path / "src", tmp_path / "dst", "mqa:0", method, calibration=calibration, sync=False)
        with pytest.raises(ArgumentError, match=message):
            Model.load(tmp_path / "src", plan="mqa:0", method=method, calibration=calibration)
