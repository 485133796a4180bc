"""Searches over real forward passes, on tiny models: what reuse computes is what a fresh model computes."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from mqadapt_rs import ArgumentError, Model, Plan, convert, load_calibration
from mqadapt_rs._core import LayerCache
from mqadapt_rs.lm_eval import MqadaptLM, evaluate
from mqadapt_rs.report import Page
from mqadapt_rs.search import Options, search
from mqadapt_rs.search.core.plan_order import branches, in_order
from mqadapt_rs.search.core.plan_record import counts, layers
from mqadapt_rs.search.evaluators.data import Data
from mqadapt_rs.search.evaluators.model_spec import read_windows
from mqadapt_rs.search.evaluators.overlays import PlanOverlays
from mqadapt_rs.search.evaluators.prefix_cache import Prefixes
from mqadapt_rs.search.evaluators.tasks import Task, TaskEvaluator, rows
from mqadapt_rs.search.evaluators.windows import WindowEvaluator
from mqadapt_rs.search.results import Results

LAYERS, HEADS = 5, 4
SOURCE = (HEADS,) * LAYERS
SENTENCES = [
    "The quick brown fox jumps over the lazy dog.", "A model reads a text, and says how likely it is;",
    "numbers such as 12, 345 and 6789 too.", "Question: what comes next?", "Answer: nobody knows, cafe naive.",
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    draws = random.Random(0)
    file.write_text(" ".join(draws.choice(SENTENCES) for _ in range(300)))
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("search") / "model"
    vocab_size = tiny.save_tokenizer(folder, text.read_text())
    shape = {"num_hidden_layers": LAYERS, "num_attention_heads": 8, "num_key_value_heads": HEADS, "head_dim": 8}
    tiny.save(folder, "llama", vocab_size=vocab_size, **shape)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": f"what follows {i}?", "o": [f"{i + 1}", f"{i * 7} it is", "none of them"], "g": i % 3} for i in range(40)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = [
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{validation: {folder / 'rows.jsonl'}}}}}",
        "validation_split: validation",
        'doc_to_text: "Question: {{q}}\\nAnswer:"',
    ]
    choice = ["task: tiny_choice", "output_type: multiple_choice", "doc_to_choice: o", "doc_to_target: g"]
    choice += ["metric_list: [{metric: acc}, {metric: acc_norm}]"]
    write = ["task: tiny_write", "output_type: generate_until", 'doc_to_target: "{{o[0]}}"']
    write += ['generation_kwargs: {until: ["\\n"], max_gen_toks: 4}', "metric_list: [{metric: exact_match}]"]
    (folder / "choice.yaml").write_text("\n".join(common + choice) + "\n")
    (folder / "write.yaml").write_text("\n".join(common + write) + "\n")
    return folder


def some_plans(number: int) -> list[tuple[int, ...]]:
    everything = list(itertools.product((1, 2, 4), repeat=LAYERS))
    return [*random.Random(1).sample(everything, number), SOURCE]


def evaluator(checkpoint: Path, windows: list[list[int]], metric: str, most: int) -> WindowEvaluator:
    return WindowEvaluator(
        PlanOverlays(Model.load(checkpoint), "mean", 0), windows, metric, Prefixes(most, layers(SOURCE))
    )


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_losses_are_those_of_fresh_models(checkpoint: Path, text: Path, metric: str) -> None:
    windows = read_windows(str(checkpoint), Data(text=str(text), context=24, windows=6), seed=0)
    plans = list(map(layers, in_order(some_plans(8))))
    found = list(evaluator(checkpoint, windows, metric, 8).losses(plans, branches(plans), range(1, 5)))
    source = Model.load(checkpoint, dtype="float32")
    for plan, losses in zip(plans, found, strict=True):
        model = Model.load(checkpoint, plan=counts(plan), method="mean", dtype="float32")
        for window, loss in zip(windows[1:5], losses, strict=True):
            own, reference = (log_softmax(m.logits(window).astype(np.float64)) for m in (model, source))
            if metric == "kl":
                expected = (np.exp(reference) * (reference - own)).sum(axis=1).mean()
            else:
                expected = -own[np.arange(len(window) - 1), window[1:]].mean()
            # f32 logits of about 10 are known to 1e-6, and their differences enter linearly
            assert loss == pytest.approx(expected, abs=2e-5)
    assert found[plans.index(layers(SOURCE))] == [0.0] * 4 or metric == "perplexity"


def log_softmax(logits: np.ndarray) -> np.ndarray:
    top = logits - logits.max(axis=1, keepdims=True)
    return top - np.log(np.exp(top).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("metric", ["kl", "perplexity"])
def test_reuse_changes_no_bit(checkpoint: Path, text: Path, metric: str) -> None:
    windows = read_windows(str(checkpoint), Data(text=str(text), context=20, windows=5), seed=0)
    plans = list(map(layers, in_order(some_plans(25))))
    results = []
    for most in (0, 1, 2, 14, 100):
        instance = evaluator(checkpoint, windows, metric, most)
        results.append(list(instance.losses(plans, branches(plans), range(5))))
        assert len(instance.prefixes._states) + len(instance.prefixes.trunk) <= most
        assert len(instance.prefixes.trunk) == min(LAYERS - 1, max(0, most - 12))  # the rest made room for branches
    # one at a time, as workers get them
    instance, depths = evaluator(checkpoint, windows, metric, 100), branches(plans)
    results.append([next(instance.losses([p], [d], range(5))) for p, d in zip(plans, depths, strict=True)])
    assert all(result == results[0] for result in results[1:])


def test_scoring_from_kept_states_changes_no_bit(checkpoint: Path) -> None:
    draws = random.Random(3)
    source = Model.load(checkpoint, max_tokens_in_flight=48)
    vocab_size = source.config.vocab_size

    def ids(number: int) -> list[int]:
        return [draws.randrange(vocab_size) for _ in range(number)]

    contexts = [ids(n) for n in (1, 5, 30, 60)]
    requests = [(context, ids(draws.randrange(1, 20))) for context in contexts * 6]
    requests += [(requests[0][0], []), ([*contexts[2], *requests[2][1][:1]], ids(4))]
    draws.shuffle(requests)
    source.loglikelihood([(ids(100), ids(80))])  # a session that was larger before
    for layer in range(LAYERS):
        plan = list(SOURCE)
        plan[layer] = 1
        model = source.with_plan(plan)
        expected = model.loglikelihood(requests)
        scores, kept = source.loglikelihood_from(requests, None, [layer])
        assert scores == source.loglikelihood(requests)
        assert [states.layer_idx for states in kept] == [layer]
        assert model.loglikelihood_from(requests, kept[0])[0] == expected
        if layer + 1 < LAYERS:  # and kept once more on the way
            _, deeper = source.loglikelihood_from(requests, kept[0], [layer + 1])
            assert source.loglikelihood_from(requests, deeper[0])[0] == scores
    # what they take is known beforehand; a few rows run twice, where a pass ends within what is scored
    assert 1 <= kept[0].nbytes / (rows(requests) * source.config.hidden_size * 4) < 1.1
    with pytest.raises(ArgumentError, match="other requests"):
        model.loglikelihood_from(requests[:-3], kept[0])
    with pytest.raises(ArgumentError, match="keep"):
        source.loglikelihood_from(requests, kept[0], [0])


@pytest.mark.parametrize("name", ["tiny_choice/acc_norm", "tiny_write/exact_match"])
def test_task_losses_are_lm_evals(checkpoint: Path, tasks: Path, name: str) -> None:
    lm = MqadaptLM(str(checkpoint))
    task = Task.load(name, Data(include_path=str(tasks), limit=30), seed=0, lm=lm)
    assert len(task.documents) == 30
    instance = TaskEvaluator(PlanOverlays(lm.model, "mean", 0), lm, task, 1 << 20)
    plans = list(map(layers, in_order(some_plans(3))))
    for plan, losses in zip(plans, instance.losses(plans, branches(plans), range(30)), strict=True):
        fresh = MqadaptLM(str(checkpoint), plan=counts(plan))
        results = evaluate(fresh, [name.split("/")[0]], include_path=tasks, limit=30, bootstrap_iters=0)
        expected = results["results"][name.split("/")[0]][name.split("/")[1] + ",none"]
        assert -sum(losses) / 30 == pytest.approx(expected, abs=1e-12)
    parts = [*instance.losses(plans[:1], [()], range(16)), *instance.losses(plans[:1], [()], range(16, 30))]
    assert parts[0] + parts[1] == next(instance.losses(plans[:1], [()], range(30)))


@pytest.mark.parametrize(("dtype", "value_bytes"), [("float32", 4), ("bfloat16", 2)])
def test_a_budget_of_bytes_is_in_bytes_of_the_cache(
    checkpoint: Path, text: Path, tmp_path: Path, dtype: str, value_bytes: int
) -> None:
    full = 2 * 8 * HEADS * LAYERS * value_bytes
    assert Model.load(checkpoint, dtype=dtype).kv_bytes_per_token == full
    common: dict[str, Any] = {"strategy": "random", "trials": 2, "text": text, "context": 16, "windows": 2}
    result = search(checkpoint, kv_budget=full // 2, dtype=dtype, out=tmp_path / "found", **common)
    assert result.winner is not None
    assert full // 4 <= result.winner.kv_bytes <= full // 2
    assert Model.load(checkpoint, result.plan, dtype=dtype).kv_bytes_per_token == result.winner.kv_bytes
    header = json.loads((tmp_path / "found" / "journal.jsonl").read_text().splitlines()[0])
    assert header["head_bytes"] == [2 * 8 * value_bytes] * LAYERS
    with pytest.raises(ArgumentError, match=f"at most {full}"):
        search(checkpoint, kv_budget=full + 1, dtype=dtype, out=tmp_path / "larger", **common)


def test_search_finds_the_best_pair(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Every plan of half the bytes is tried one by one: the search finds the best of them."""
    result = search(
        checkpoint, strategy="budget", metric="kl", text=text, context=24, windows=8, counts=[1], kv_budget="55%",
        out=tmp_path / "a",
    )  # fmt: skip
    assert result.winner is not None
    windows = read_windows(str(checkpoint), Data(text=str(text), context=24, windows=8), seed=0)
    combinations = itertools.combinations(range(5), 3)
    ranks = in_order([tuple(1 if i in chosen else 4 for i in range(LAYERS)) for chosen in combinations])
    plans = list(map(layers, ranks))
    losses = evaluator(checkpoint, windows, "kl", 5).losses(plans, branches(plans), range(8))
    damages = {plan: sum(loss) / 8 for plan, loss in zip(plans, losses, strict=True)}
    assert result.winner.damage.mean == pytest.approx(min(damages.values()), rel=1e-9)
    plan = Plan.parse(str(tmp_path / "a" / "best.plan.json"), checkpoint)
    assert plan == result.plan
    assert plan.kv_bytes_per_token(checkpoint, 4) == result.winner.kv_bytes  # the checkpoint is float32
    convert(checkpoint, tmp_path / "converted", plan=tmp_path / "a" / "best.plan.json", method="mean")
    assert Model.load(tmp_path / "converted").config.num_key_value_heads == counts(result.winner.plan)


@pytest.mark.slow
def test_workers_write_the_same_journal(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    def run(name: str, **options: int) -> list[dict[str, object]]:
        search(
            checkpoint, strategy="greedy", metric="kl", text=text, context=16, windows=40, counts=[1], max_damage=0.3,
            out=tmp_path / name, **options,
        )  # fmt: skip
        lines = (tmp_path / name / "journal.jsonl").read_text().splitlines()
        # the checksum is that of the time as well
        return [{k: v for k, v in json.loads(line).items() if k not in {"seconds", "line_blake2b"}} for line in lines]

    assert run("one") == run("two", workers=2)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mqadapt_rs.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line(checkpoint: Path, text: Path, tasks: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = [
        "search", checkpoint, "--strategy", "sensitivity", "--text", text, "--context", 16, "--windows", 20,
        "--out", tmp_path / "s",
    ]  # fmt: skip
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Winner (least damage): ")
    again = run(*arguments)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    resumed = run(*arguments, "--resume", "--json")
    assert json.loads(resumed.stdout)["evaluations"] == 1 + 2 * LAYERS
    for command in ("plot", "report"):
        done = run(command, tmp_path / "s")
        assert done.returncode == 0, done.stderr
        assert all(Path(line).is_file() for line in done.stdout.splitlines())
    by_task = [
        "search", checkpoint, "--strategy", "alternate", "--metric", "task:tiny_choice/acc", "--include-path", tasks,
        "--limit", 20, "--out", tmp_path / "t",
    ]  # fmt: skip
    done = run(*by_task)
    assert done.returncode == 0, done.stderr
    same_folder = ["--strategy", "alternate", "--text", text, "--context", 16, "--out", tmp_path / "t"]
    other = run(*arguments[:2], *same_folder, "--resume")
    assert other.returncode == 2
    assert "belongs to another search" in other.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "blue"}, "no metric 'blue'"),
        ({"metric": "kl"}, "need a text"),
        ({"metric": "kl", "text": "TEXT", "windows": 100000}, "windows"),
        ({"metric": "kl", "text": "TEXT", "max_memory": 1000}, "too little"),
        ({"metric": "task:none/acc"}, "no such task"),
        ({"metric": "task:tiny_choice/f1"}, "no metric 'f1'"),
        ({"strategy": "luck"}, "no strategy 'luck'"),
        ({"strategy": "budget", "kv_budget": "200%", "text": "TEXT"}, "budget"),
        ({"counts": [3], "text": "TEXT"}, "nothing to search"),
        ({"workers": 1, "ray": ""}, "choose one"),
        ({"method": "best", "text": "TEXT"}, "best"),
        ({"method": "best", "text": "TEXT", "strategy": "budget", "latency_budget": "90%", "depth": 4}, "best"),
        (
            {"method": "closed-form", "text": "TEXT", "calibration": "TEXT", "strategy": "budget", "kv_budget": "200%"},
            "200%",
        ),
        ({"strategy": "given", "text": "TEXT", "plans": ["keep"]}, "other than 'keep'"),
        ({"sequential": True, "text": "TEXT"}, "method mean has no refit"),
        (
            {"refine": 2, "metric": "predicted", "method": "closed-form", "calibration": "TEXT"},
            "predicted has no refit",
        ),
        ({"weights": "int2", "text": "TEXT"}, "int2"),
        ({"method": "closed-form", "text": "TEXT"}, "--calibration FILE or --stats FILE"),
        ({"metric": "predicted"}, "--calibration FILE or --stats FILE"),
    ],
)
@pytest.mark.filterwarnings("ignore:.* tokens of calibration text:UserWarning")
def test_wrong_arguments(
    checkpoint: Path, text: Path, tasks: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    given = {key: str(text) if value == "TEXT" else value for key, value in options.items()}
    fitting = {"context": 16, "windows": 8, "include_path": tasks, "out": tmp_path}
    arguments = {"strategy": "sensitivity", **fitting, **given}
    with pytest.raises(ArgumentError, match=message):
        search(checkpoint, **arguments)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["mean", "closed-form", "prune"])
def test_predictions_need_no_documents(checkpoint: Path, text: Path, tmp_path: Path, method: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the text is short
        result = search(
            checkpoint, strategy="budget", kv_budget="60%", metric="predicted", method=method, calibration=text,
            calibration_tokens=2048, calibration_context=64, target_context=[32], out=tmp_path,
        )  # fmt: skip
        calibration = load_calibration(
            checkpoint, text, tokens=2048, context=64, target_context=[32], stats=tmp_path / "statistics.safetensors"
        )
    assert result.winner is not None
    plan = result.winner.plan
    changed = [(layer, own) for layer, own in enumerate(plan) if own != LayerCache(HEADS)]
    errors = calibration.predicted_errors(checkpoint, method, changed)
    assert all(0 < error < 2 for error in errors)
    assert result.winner.damage.mean == pytest.approx(sum(error**2 for error in errors), rel=1e-9)
    assert result.winner.standard_error is None
    # predictions of layers add up, so the knapsack is exact
    singles = {e.plan: e.value for e in result.evaluations}
    assert min(singles, key=lambda plan: singles[plan]) == layers(SOURCE)
    with pytest.raises(ArgumentError, match="no prediction"):
        calibration.predicted_errors(checkpoint, "random", changed)


def test_named_plans_on_the_calibration_text(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """What `--strategy given` measures is what the same plans cost in any other search; plans come in every form."""
    common: dict[str, Any] = {"context": 24, "windows": 5, "metric": "perplexity"}
    whole = search(checkpoint, strategy="alternate", text=text, out=tmp_path / "whole", **common)
    (tmp_path / "plan.json").write_text(json.dumps({"num_key_value_heads": [4, 4, 1, 4, 1]}))
    plans = [str(tmp_path / "plan.json"), "mqa:0,2,4", [4, 4, 4, 4, 4]]
    result = search(checkpoint, strategy="given", calibration=text, plans=plans, out=tmp_path / "given", **common)
    expected = {e.plan: e.losses for e in whole.evaluations}
    assert {e.plan: e.losses for e in result.evaluations} == expected
    command = json.loads((tmp_path / "given" / "summary.json").read_text())["command"]
    assert "--strategy given" in command
    assert "--plan mqa:2,4 --plan mqa:0,2,4" in command


def test_options_are_checked_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="does nothing"):
        search(tmp_path / "no-model", strategy="sensitivity", trials=3, out=tmp_path)
    assert Options().trials is None


def test_methods_that_merge_from_text(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Layers merged once and put together are those of a model that was merged with the whole plan."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the text is short
        stats = tmp_path / "s" / "statistics.safetensors"
        result = search(
            checkpoint, strategy="alternate", metric="kl", method="closed-form", calibration=text, calibration_tokens=2048,
            calibration_context=64, target_context=[32], text=text, context=24, windows=4, out=tmp_path / "s",
        )  # fmt: skip
        assert stats.is_file()
        assert result.winner is not None
        calibration = load_calibration(checkpoint, text, tokens=2048, context=64, target_context=[32], stats=stats)
        whole = Model.load(checkpoint).with_plan(result.plan, "closed-form", calibration=calibration)
        windows = read_windows(str(checkpoint), Data(text=str(text), context=24, windows=4), seed=0)
        source = Model.load(checkpoint)
        states = (source.hidden_before(LAYERS, windows), whole.hidden_before(LAYERS, windows))
        assert source.kl_divergence(*states).mean() == pytest.approx(result.winner.value, rel=1e-9)
    summary = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert f"--stats {stats}" in summary["calibration_arguments"]
    header = json.loads((tmp_path / "s" / "journal.jsonl").read_text().splitlines()[0])
    assert "2048 tokens of text.txt" in header["calibration"]


@pytest.mark.parametrize("metric", ["perplexity", "task:tiny_choice/acc"])
def test_a_refit_sees_the_whole_plan(checkpoint: Path, text: Path, tasks: Path, tmp_path: Path, metric: str) -> None:
    """Every plan is merged as `convert --sequential` would: layers refitted one by one are others."""
    drawn: dict[str, Any] = {"calibration_tokens": 1024, "calibration_context": 64, "target_context": [32]}
    common: dict[str, Any] = {"strategy": "from-end", "metric": metric, "method": "closed-form", "counts": [1]}
    data: dict[str, Any] = {"text": text, "context": 24, "windows": 4, "include_path": tasks, "limit": 20}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the text is short
        found = {}
        for name, refit in (("alone", {}), ("refitted", {"sequential": True}), ("refined", {"refine": 2})):
            out = tmp_path / name
            result = search(checkpoint, calibration=text, out=out, **drawn, **common, **data, **refit)
            found[name] = {e.plan: e.losses for e in result.evaluations}
        calibration = load_calibration(checkpoint, text, tokens=1024, context=64, target_context=[32], sequential=True)
        assert len({tuple(map(str, losses.values())) for losses in found.values()}) == 3 or metric != "perplexity"
        windows = read_windows(str(checkpoint), Data(text=str(text), context=24, windows=4), seed=0)
        for plan, losses in found["refitted"].items():
            model = Model.load(checkpoint, counts(plan), "closed-form", calibration=calibration)
            if metric == "perplexity":
                assert losses == pytest.approx([np.log(model.perplexity(w, context=24)) for w in windows], abs=1e-6)
            else:
                lm = MqadaptLM(str(checkpoint))
                lm.model = model
                values = evaluate(lm, ["tiny_choice"], include_path=tasks, limit=20)["results"]["tiny_choice"]
                assert -np.mean(losses) == pytest.approx(values["acc,none"])
    header = json.loads((tmp_path / "refitted" / "journal.jsonl").read_text().splitlines()[0])
    summary = json.loads((tmp_path / "refitted" / "summary.json").read_text())
    assert header["calibration"].endswith(", refitted")
    assert header["error_rate"] is None
    assert " --sequential" in summary["calibration_arguments"]
    assert " --sequential" in summary["command"]


def test_int8_weights(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    """Losses are those of models loaded so, and a journal of other weights is refused."""
    common: dict[str, Any] = {
        "strategy": "alternate",
        "metric": "perplexity",
        "text": text,
        "context": 24,
        "windows": 4,
    }
    plain = search(checkpoint, out=tmp_path / "stored", **common)
    result = search(checkpoint, out=tmp_path / "int8", weights="int8", **common)
    assert [e.plan for e in result.evaluations] == [e.plan for e in plain.evaluations]
    assert [e.losses for e in result.evaluations] != [e.losses for e in plain.evaluations]
    windows = read_windows(str(checkpoint), Data(text=str(text), context=24, windows=4), seed=0)
    for evaluation in result.evaluations:
        model = Model.load(checkpoint, counts(evaluation.plan), weights="int8")
        expected = [np.log(model.perplexity(window, context=24)) for window in windows]
        assert evaluation.losses == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ArgumentError, match="belongs to another search"):
        search(checkpoint, out=tmp_path / "int8", resume=True, **common)
    summary = json.loads((tmp_path / "int8" / "summary.json").read_text())
    assert "--weights int8" in summary["command"]
    settings = dict(Page(Results.load(tmp_path / "int8"), []).settings()[1])
    assert settings["weights"] == "int8"
