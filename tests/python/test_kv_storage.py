"""K/V caches of integers: in plans, in `kv`, on the command line. `tests::parity` of `mqadapt-model` holds the numbers.

The oracle is the same model with its cache as computed. Weights of the tiny models are large, so that logits tell caches apart.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tiny
from mqadapt_rs import ArgumentError, Model, MqadaptError, Plan, convert, inspect
from mqadapt_rs import text as texts
from mqadapt_rs._core import LayerCache
from mqadapt_rs.bench import bench
from mqadapt_rs.cli.app import app
from mqadapt_rs.search import search

HEADS, HEAD_DIM, LAYERS = 6, 8, 3
IDS = tiny.ids(60)
# per head and token: a key and a value, each with a scale of two bytes
BYTES = {"int8": 2 * (HEAD_DIM + 2), "int4": 2 * (HEAD_DIM // 2 + 2)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save(tmp_path_factory.mktemp("kv") / "llama", "llama", vocab_size=320)
    tiny.save_tokenizer(folder, "a text about nothing, which a tokenizer is trained on", vocab_size=320)
    return folder


def distance(model: Model, other: Model) -> float:
    """Root mean square of the difference of their logits, as a share of those of `other`."""
    a, b = model.logits(IDS), other.logits(IDS)
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_is_near_its_exact_cache(family: str, tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "model", family)
    exact = Model.load(folder)
    distances = {kv: distance(Model.load(folder, kv=kv), exact) for kv in BYTES}
    assert 0 < distances["int8"] < 0.05, distances
    assert distances["int8"] < distances["int4"] < 0.8, distances


@pytest.mark.parametrize("kv", BYTES)
def test_kv_is_the_plan_for_all_layers(source: Path, kv: str) -> None:
    short, long = Model.load(source, kv=kv), Model.load(source, f"keep@{kv}:all")
    np.testing.assert_array_equal(short.logits(IDS), long.logits(IDS))
    assert short.plan == long.plan
    assert short.fingerprint == long.fingerprint != Model.load(source).fingerprint
    assert short.plan.changed_layers == []  # no weight changes


@pytest.mark.parametrize("kv", BYTES)
def test_the_allocation_is_what_the_plan_counts(source: Path, kv: str) -> None:
    model = Model.load(source, kv=kv)
    assert model.kv_bytes_per_token == LAYERS * HEADS * BYTES[kv]
    assert model.plan.kv_bytes_per_token(source, value_bytes=4) == model.kv_bytes_per_token
    model.logits(tiny.ids(200))
    assert model.kv_bytes() % model.kv_bytes_per_token == 0
    assert 200 <= model.kv_bytes() // model.kv_bytes_per_token <= 256


@pytest.mark.parametrize("kv", BYTES)
@pytest.mark.parametrize("steps", [[1] * 60, [17, 1, 1, 41], [59, 1]], ids=["one_by_one", "pieces", "prefill_and_one"])
def test_how_a_text_is_cut_changes_nothing(source: Path, kv: str, steps: list[int]) -> None:
    model = Model.load(source, kv=kv)
    np.testing.assert_array_equal(model.logits_in_steps(IDS, steps), model.logits(IDS))


def test_scores_and_generation_are_those_of_the_logits(source: Path) -> None:
    model = Model.load(source, kv="int4")
    scores = model.loglikelihood([(IDS[:20], IDS[20:30]), (IDS[:20], IDS[30:45])])
    for (total, _), continuation in zip(scores, (IDS[20:30], IDS[30:45]), strict=True):
        logits = torch.from_numpy(model.logits([*IDS[:20], *continuation])[19:-1]).double()
        own = logits.log_softmax(-1)[range(len(continuation)), continuation]
        assert total == pytest.approx(float(own.sum()), abs=1e-3)
    alone = [model.generate(IDS[:n], max_new_tokens=12, stop_tokens=[]) for n in (5, 20)]
    assert model.generate([IDS[:5], IDS[:20]], max_new_tokens=12, stop_tokens=[]) == alone
    assert int(model.logits(IDS[:20])[-1].argmax()) == alone[1][0]


def test_form_and_storage_go_together(source: Path) -> None:
    plan = Plan.parse("mqa@int4:0; keep@int8:2", source)
    assert plan.num_key_value_heads == [1, 6, 6]
    assert plan.storage == ["int4", "computed", "int8"]
    assert plan.describe() == "mqa@int4:0; keep@int8:2"
    assert plan.layers[0] == LayerCache(1, "int4") != LayerCache(1)
    assert str(plan.layers[0]) == "mqa@int4"
    assert pickle.loads(pickle.dumps(plan.layers)) == plan.layers  # noqa: S301
    assert plan.kv_bytes_per_token(source, value_bytes=4) == BYTES["int4"] + HEADS * (8 * HEAD_DIM + BYTES["int8"])
    merged = Model.load(source, "mqa:0")
    assert 0 < distance(Model.load(source, plan), merged) < 0.8


def test_a_plan_file_says_how_caches_are_stored(source: Path, tmp_path: Path) -> None:
    plan = Plan.parse("gqa2@int8:0,1", source)
    file = tmp_path / "plan.json"
    file.write_text(str(plan))
    assert json.loads(str(plan)) == {"num_key_value_heads": [2, 2, 6], "storage": ["int8", "int8", "computed"]}
    assert Plan.parse(file, source) == plan
    yaml = tmp_path / "plan.yaml"
    yaml.write_text("num_key_value_heads: [2, 2, 6]\nstorage: [int8, int8, computed]\n")
    assert Plan.parse(yaml, source) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keep@int5:all", "int5"),
        ("mqa@:all", "@"),
        ('{"num_key_value_heads": [6, 6, 6], "storage": ["int8"]}', "1"),
        ('{"num_key_value_heads": [6, 6, 6], "storage": ["int8", 4, "int8"]}', "4 is no storage"),
    ],
)
def test_a_wrong_storage_is_named(source: Path, tmp_path: Path, text: str, message: str) -> None:
    if text.startswith("{"):
        (tmp_path / "plan.json").write_text(text)
        text = str(tmp_path / "plan.json")
    with pytest.raises(ArgumentError, match=message):
        Plan.parse(text, source)


def test_what_cannot_be_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="stores the K/V cache of layer 1 as int8, but kv asks for int4"):
        Model.load(source, "keep@int8:1", kv="int4")
    with pytest.raises(ArgumentError, match="kv 'int2' is not one of computed, int8, int4"):
        Model.load(source, kv="int2")
    with pytest.raises(ArgumentError, match=r"int8.*needs device 'cpu'"):
        Model.load(source, kv="int8", device="cpu-stock")
    with pytest.raises(MqadaptError, match=r"a checkpoint has weights alone.*--kv int8"):
        convert(source, tmp_path / "out", "mqa@int8:all")
    assert not (tmp_path / "out").exists()
    (tmp_path / "text.txt").write_text("a text " * 200)
    with pytest.raises(ArgumentError, match=r"'mqa@int4:0' says how K/V caches are stored.*leave '@int4' out"):
        search(
            source,
            strategy="given",
            plans=["mqa@int4:0"],
            text=tmp_path / "text.txt",
            out=tmp_path / "search",
            context=64,
            windows=2,
        )
    assert not (tmp_path / "search").exists()


def test_another_plan_brings_its_own_storage(source: Path) -> None:
    model = Model.load(source, kv="int8")
    np.testing.assert_array_equal(model.with_plan("mqa:0").logits(IDS), Model.load(source, "mqa:0").logits(IDS))
    again = Model.load(source, "mqa:0").with_plan("mqa@int8:0")
    np.testing.assert_array_equal(again.logits(IDS), Model.load(source, "mqa@int8:0").logits(IDS))


def run(*arguments: str) -> Any:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_on_the_command_line(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text about nothing, which a tokenizer is trained on. " * 8)
    measure = ["perplexity", str(source), "--text", str(text), "--context", "32", "--windows", "2"]
    values = {kv: run(*measure, *(["--kv", kv] if kv else []))["perplexity"] for kv in ("", "computed", *BYTES)}
    assert values[""] == values["computed"]
    assert len(set(values.values())) == 3
    assert run(*measure, "--plan", "keep@int4:all")["perplexity"] == values["int4"]
    ids = texts.token_ids(texts.load_tokenizer(source), "a text")
    for kv in BYTES:
        done = run("generate", str(source), "--prompt", "a text", "--max-new-tokens", "4", "--kv", kv)
        assert done["ids"] == Model.load(source, kv=kv).generate(ids, max_new_tokens=4)
    done = CliRunner().invoke(app, [*measure, "--kv", "int5"])
    assert done.exit_code != 0
    assert str(done.exception) == "kv 'int5' is not one of computed, int8, int4"


def test_bench_counts_the_bytes_that_are_stored(source: Path) -> None:
    report = bench(source, ["mqa:all", "keep@int4:all"], depths=[4], prompts=[8], steps=1, rounds=1)
    bytes_per_token = [row["kv_bytes_per_token"] for row in report["plans"]]
    assert bytes_per_token == [LAYERS * HEADS * 8 * HEAD_DIM, LAYERS * 8 * HEAD_DIM, LAYERS * HEADS * BYTES["int4"]]
    stored = bench(source, ["mqa:all"], kv="int8", depths=[4], prompts=[], steps=1, rounds=1)
    assert [row["kv_bytes_per_token"] for row in stored["plans"]] == [
        LAYERS * HEADS * BYTES["int8"],
        LAYERS * BYTES["int8"],
    ]


def test_inspect_of_a_source_knows_no_storage(source: Path) -> None:
    assert inspect(source)["kv_bytes_per_token"] == LAYERS * HEADS * 8 * HEAD_DIM
