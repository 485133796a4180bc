"""A plan file carries method, calibration and options to everything that applies it."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mqadapt_rs import ArgumentError, Calibration, Model, MqadaptError, convert, load_calibration
from mqadapt_rs.lm_eval import MqadaptLM
from mqadapt_rs.search import search

TEXT = "One day, a little girl named Lily found a needle in her room. She knew it was difficult to play with it. " * 20
IDS = [504, 2365, 282, 4649, 314]
COUNTS = {"calibration_tokens": 256, "calibration_context": (32, 64)}
WORDS = ["--calibration-tokens", 256, "--calibration-context", "32,64"]
FEW = pytest.mark.filterwarnings("ignore:.*tokens of calibration text are few")

pytestmark = FEW


def mqadapt(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mqadapt_rs.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def plan_file(path: Path, heads: list[int], method: str | None = None, **options: Any) -> Path:
    document = {"num_key_value_heads": heads, **({} if method is None else {"method": method, "options": options})}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document))
    return path


HEADS = [3] * 27 + [1] * 3


@pytest.fixture
def named(tmp_path: Path, text: Path) -> Path:
    """A plan file in another folder than its text."""
    options = {"seed": 3, "calibration": f"../{text.name}", **COUNTS, "sequential": True}
    return plan_file(tmp_path / "plans" / "own.json", HEADS, "closed-form", **options)


def expected(src: Path, text: Path, seed: int = 3, **options: Any) -> Model:
    options = {"sequential": True, **options}
    calibration = load_calibration(src, text, tokens=256, context=(32, 64), seed=seed, **options)
    return Model.load(src, HEADS, "closed-form", seed, calibration=calibration)


def test_a_search_writes_method_and_calibration(lookalike: Path, text: Path, tmp_path: Path) -> None:
    found = search(
        lookalike, strategy="given", metric="kl", method="closed-form", text=text, context=16, windows=2, out=tmp_path / "found",
        plans=["mqa:last3"], calibration=text, seed=3, **COUNTS,
    )  # fmt: skip
    best = tmp_path / "found" / "best.plan.json"
    document = json.loads(best.read_text())
    assert document["method"] == "closed-form"
    options = document["options"]
    assert options["calibration"] == f"../{text.name}"
    assert options["stats"] == "statistics.safetensors"
    assert (options["seed"], options["calibration_tokens"], options["calibration_context"]) == (3, 256, [32, 64])
    assert found.plan is not None
    wanted = expected(lookalike, text, sequential=False).logits(IDS)
    np.testing.assert_array_equal(Model.load(lookalike, best).logits(IDS), wanted)
    text.unlink()  # the statistics are enough
    np.testing.assert_array_equal(Model.load(lookalike, best).logits(IDS), wanted)
    assert not np.array_equal(Model.load(lookalike, HEADS).logits(IDS), wanted)


def test_a_search_by_weights_names_no_text(lookalike: Path, text: Path, tmp_path: Path) -> None:
    search(
        lookalike, strategy="given", metric="kl", method="first", text=text, context=16, windows=2, out=tmp_path / "found",
        plans=["mqa:last3"],
    )  # fmt: skip
    document = json.loads((tmp_path / "found" / "best.plan.json").read_text())
    assert {key: document[key] for key in ("method", "options")} == {"method": "first", "options": {"seed": 0}}


def test_everything_takes_method_and_calibration_from_the_file(
    lookalike: Path, text: Path, named: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = expected(lookalike, text).logits(IDS)
    monkeypatch.chdir("/")
    source = Model.load(lookalike)
    np.testing.assert_array_equal(Model.load(lookalike, named).logits(IDS), wanted)
    np.testing.assert_array_equal(Model.load(lookalike, str(named)).logits(IDS), wanted)
    np.testing.assert_array_equal(source.with_plan(named).logits(IDS), wanted)
    lm = MqadaptLM(str(lookalike), plan=str(named))
    assert lm.method == "closed-form"
    np.testing.assert_array_equal(lm.model.logits(IDS), wanted)
    manifest = convert(lookalike, tmp_path / "out", named).manifest
    assert (manifest["method"], manifest["options"]["sequential"], manifest["options"]["seed"]) == (
        "closed-form",
        True,
        3,
    )
    np.testing.assert_array_equal(Model.load(tmp_path / "out").logits(IDS), wanted)


def test_commands_take_them_and_an_option_overrides(lookalike: Path, text: Path, named: Path, tmp_path: Path) -> None:
    def converted(name: str, *options: object) -> tuple[dict[str, Any], str]:
        done = mqadapt("convert", lookalike, tmp_path / name, "--plan", named, *options)
        assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / name / "mqadapt.json").read_text()), done.stderr

    own, said = converted("own")
    assert own["method"] == "closed-form"
    assert (own["options"]["seed"], own["options"]["sequential"]) == (3, True)
    assert "overrides" not in said
    mean, said = converted("mean", "--method", "mean")
    assert mean["method"] == "mean"
    assert "mean overrides closed-form" in said
    again, said = converted("again", "--method", "closed-form", "--seed", 3, "--calibration-tokens", 256)
    assert again["options"] == own["options"]
    assert "overrides" not in said
    fewer, said = converted("fewer", "--calibration-tokens", 128, "--seed", 4)
    assert fewer["options"]["calibration_tokens"] == 128
    assert fewer["options"]["sequential"] is True
    assert "--calibration-tokens overrides" in said
    assert "4 overrides 3" in said
    prune, _ = converted("prune", "--method", "prune")
    assert prune["method"] == "prune"
    model = expected(lookalike, text)
    words = ["--text", text, "--context", 32, "--windows", 2, "--json"]
    done = mqadapt("perplexity", lookalike, "--plan", named, *words)
    from mqadapt_rs import text as texts

    ids = texts.first_windows(texts.read_ids(texts.load_tokenizer(lookalike), text, "text", 64), 32, 2)
    assert json.loads(done.stdout)["perplexity"] == model.perplexity(ids, context=32)


def test_another_text_leaves_the_statistics_of_the_file_out(lookalike: Path, text: Path, tmp_path: Path) -> None:
    options = {"calibration": f"../{text.name}", **COUNTS, "stats": "own.stats"}
    plan = plan_file(tmp_path / "plans" / "own.json", HEADS, "closed-form", **options)
    Model.load(lookalike, plan)
    assert (plan.parent / "own.stats").exists()
    other = tmp_path / "other.txt"
    other.write_text("Beyond the hills there was a lake where nobody had ever been, and a boat. " * 30)
    done = mqadapt("convert", lookalike, tmp_path / "out", "--plan", plan, "--calibration", other)
    assert done.returncode == 0, done.stderr
    assert "--calibration overrides" in done.stderr
    text.unlink()
    done = mqadapt("convert", lookalike, tmp_path / "saved", "--plan", plan, "--stats", plan.parent / "own.stats")
    assert done.returncode == 0, done.stderr


def test_a_manifest_and_a_list_are_plan_files(lookalike: Path, text: Path, named: Path, tmp_path: Path) -> None:
    convert(lookalike, tmp_path / "random", HEADS, "random", seed=9)
    manifest = tmp_path / "random" / "mqadapt.json"
    wanted = Model.load(tmp_path / "random").logits(IDS)
    np.testing.assert_array_equal(Model.load(lookalike, manifest).logits(IDS), wanted)
    convert(lookalike, tmp_path / "again", manifest)
    assert json.loads((tmp_path / "again" / "mqadapt.json").read_text()) == json.loads(manifest.read_text())
    convert(lookalike, tmp_path / "calibrated", named)
    manifest = tmp_path / "calibrated" / "mqadapt.json"
    with pytest.raises(ArgumentError, match="give it a calibration"):
        Model.load(lookalike, manifest)
    done = mqadapt("convert", lookalike, tmp_path / "third", "--plan", manifest, "--calibration", text)
    assert done.returncode == 0, done.stderr
    options = json.loads((tmp_path / "third" / "mqadapt.json").read_text())["options"]
    assert options == json.loads(manifest.read_text())["options"]
    heads = tmp_path / "heads.json"
    heads.write_text(json.dumps(HEADS))
    assert Model.load(lookalike, heads).config.num_key_value_heads == HEADS


def test_python_says_what_overrides_a_file(lookalike: Path, text: Path, named: Path) -> None:
    with pytest.warns(UserWarning, match="first overrides closed-form"):
        Model.load(lookalike, named, "first")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        own = Calibration(stats=None, sequences=[list(range(600)), list(range(512))])
        Model.load(lookalike, named, "closed-form", 3, calibration=own)
    with pytest.warns(UserWarning, match="overrides") as said:
        Model.load(lookalike, named, "first", 4)
    assert any("seed 4 overrides 3" in str(one.message) for one in said)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"method": 1}, "name of a merge method"),
        ({"method": "closest"}, "closest"),
        ({"options": {"calibration_token": 5}}, "calibration_token"),
        ({"options": []}, "options"),
        ({"options": {"calibration_context": ["x"]}}, "options"),
        ({"options": {"seed": -1}}, "options"),
        ({"method": "closed-form", "options": {"calibration": "nowhere.txt"}}, "nowhere.txt"),
        ({"method": "closed-form", "options": {"stats": "nowhere.stats"}}, "nowhere.stats"),
        ({"methods": "mean"}, "unknown field 'methods'"),
    ],
)
def test_broken_settings_are_refused(lookalike: Path, tmp_path: Path, broken: dict[str, Any], message: str) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"num_key_value_heads": HEADS, **broken}))
    with pytest.raises((MqadaptError, ArgumentError, OSError), match=message):
        Model.load(lookalike, plan)
