"""Numbers and texts that cannot be: every public function refuses them by name, whatever their size or type."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mqadapt_rs as mq
from mqadapt_rs import ArgumentError, MqadaptError, load_calibration
from mqadapt_rs import text as texts
from mqadapt_rs.bench import bench
from mqadapt_rs.search import search

IDS = list(range(5, 15))
VALUES: list[Any] = [
    *(-1, 0, 1, -(2**31), 2**31, 2**32, 2**63 - 1, 2**63, -(2**63) - 1, 2**64 - 1, 2**64, 2**127, 10**40, -(10**5000)),
    *(True, False, None, 1.5, float("nan"), float("inf"), "1", b"1", [1]),
    *(np.int8(2), np.int64(-5), np.uint64(2**63), np.float32(2), np.array(2), np.array([2])),
]
Place = tuple[mq.Model, Path, Path]  # a model, its folder, an empty folder


def hidden(model: mq.Model) -> mq.HiddenStates:
    return model.hidden_before(1, [IDS])


# function and argument -> a call with that argument; none takes long with any of the values
CALLS: dict[str, Callable[[Place, Any], object]] = {
    "load.seed": lambda at, n: mq.Model.load(at[1], "mqa:0", "random", seed=n),
    "load.max_tokens_in_flight": lambda at, n: mq.Model.load(at[1], max_tokens_in_flight=n).loglikelihood([(IDS, IDS)]),
    "with_plan.seed": lambda at, n: at[0].with_plan("mqa:0", "random", n),
    "with_layers_of": lambda at, n: at[0].with_layers_of([(n, at[0])]),
    "bytes_per_step": lambda at, n: at[0].bytes_per_step(n),
    "measure_decode.depth": lambda at, n: at[0].measure_decode(n, 1),
    "measure_decode.steps": lambda at, n: at[0].measure_decode(1, n),
    "measure_decode.nothing": lambda at, n: at[0].measure_decode(0, 0, n),
    "measure_decode.sequences": lambda at, n: at[0].measure_decode(1, 1, n),
    "measure_prefill.tokens": lambda at, n: at[0].measure_prefill(n, 1),
    "measure_prefill.passes": lambda at, n: at[0].measure_prefill(1, n),
    "logits.ids": lambda at, n: at[0].logits([n]),
    "logits_in_steps": lambda at, n: at[0].logits_in_steps(IDS, [n]),
    "loglikelihood_from.keep": lambda at, n: at[0].loglikelihood_from([(IDS, IDS)], None, [n]),
    "perplexity.context": lambda at, n: at[0].perplexity(IDS, n),
    "perplexity.windows": lambda at, n: at[0].perplexity(IDS, 5, n),
    "generate.ids": lambda at, n: at[0].generate([n], 1),
    "generate.max_new_tokens": lambda at, n: at[0].generate(IDS, n, stop_tokens=[*range(49152)]),
    "generate.temperature": lambda at, n: at[0].generate(IDS, 1, n),
    "generate.top_k": lambda at, n: at[0].generate(IDS, 1, 1.0, top_k=n),
    "generate.top_p": lambda at, n: at[0].generate(IDS, 1, 1.0, top_p=n),
    "generate.seed": lambda at, n: at[0].generate(IDS, 1, 1.0, seed=n),
    "generate.stop_tokens": lambda at, n: at[0].generate(IDS, 1, stop_tokens=[n]),
    "hidden_before": lambda at, n: at[0].hidden_before(n, [IDS]),
    "forward_from": lambda at, n: at[0].forward_from(hidden(at[0]), n),
    "Calibration.target_context": lambda at, n: mq.Calibration([IDS], target_context=[n]).fingerprint,
    "Calibration.refine": lambda at, n: mq.Calibration([IDS], refine=n),
    "Calibration.fast_pairs": lambda at, n: mq.Calibration([IDS], fast_pairs=n),
    "predicted_errors.layer": lambda at, n: mq.Calibration([IDS]).predicted_errors(at[1], "mean", [(n, 1)]),
    "predicted_errors.heads": lambda at, n: mq.Calibration([IDS]).predicted_errors(at[1], "mean", [(0, n)]),
    "kv_bytes_per_token": lambda at, n: at[0].plan.kv_bytes_per_token(at[1], n),
    "Plan.parse": lambda at, n: mq.Plan.parse([n] * 30, at[1]),
    "convert.seed": lambda at, n: mq.convert(at[1], at[2] / "out", "mqa:0", "random", seed=n, sync=False),
    "convert.max_memory": lambda at, n: mq.convert(at[1], at[2] / "out", max_memory=n, sync=False),
    "convert.max_shard_size": lambda at, n: mq.convert(at[1], at[2] / "out", max_shard_size=n, sync=False),
    "bench.groups": lambda at, n: bench(at[1], groups=[n], depths=[1], prompts=[], steps=1, rounds=1),
    "bench.depths": lambda at, n: bench(at[1], depths=[n], prompts=[], steps=1, rounds=1),
    "bench.prompts": lambda at, n: bench(at[1], depths=[], prompts=[n], steps=1, rounds=1),
    "bench.steps": lambda at, n: bench(at[1], depths=[1], prompts=[], steps=n, rounds=1),
    "bench.rounds": lambda at, n: bench(at[1], depths=[], prompts=[2**40], rounds=n),
    "load_calibration.tokens": lambda at, n: load_calibration(at[1], at[1] / "t.txt", tokens=n, context=8),
    "load_calibration.context": lambda at, n: load_calibration(at[1], at[1] / "t.txt", context=n),
    "load_calibration.seed": lambda at, n: load_calibration(at[1], at[1] / "t.txt", context=8, seed=n),
    "first_windows.context": lambda at, n: texts.first_windows(IDS, n, None),
    "first_windows.windows": lambda at, n: texts.first_windows(IDS, 2, n),
}
SEARCH = [
    "context",
    "windows",
    "limit",
    "num_fewshot",
    "depth",
    "points",
    "swaps",
    "trials",
    "calibration_tokens",
    "calibration_context",
    "refine",
    "max_memory",
    "seed",
    "workers",
    "counts",
    "max_damage",
    "error_rate",
    "kv_budget",
    "latency_budget",
    "target_context",
    "plans",
]


def searched(at: Place, name: str, value: Any) -> object:
    """A search that ends at once: its text does not exist."""
    listed = name in {"counts", "target_context", "plans"}
    strategy = {"points": "pareto", "swaps": "budget", "trials": "random", "plans": "given"}.get(name, "sensitivity")
    options: dict[str, Any] = {name: [value] if listed else value}
    return search(at[1], strategy=strategy, out=at[2] / "found", text=at[2] / "absent.txt", **options)


CALLS |= {f"search.{name}": lambda at, n, name=name: searched(at, name, n) for name in SEARCH}  # type: ignore[misc]


@pytest.fixture(scope="module")
def loaded(lookalike: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[mq.Model, Path]:
    folder = tmp_path_factory.mktemp("model")
    for file in lookalike.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "t.txt").write_text("One day, a little girl named Lily found a needle in her room. " * 8)
    return mq.Model.load(folder), folder


@pytest.mark.filterwarnings("ignore:.*tokens of calibration text are few")
@pytest.mark.parametrize("name", CALLS)
def test_numbers_that_cannot_be(name: str, loaded: tuple[mq.Model, Path], tmp_path: Path) -> None:
    for number, value in enumerate(VALUES):
        scratch = tmp_path / str(number)
        scratch.mkdir()
        error = None
        try:
            CALLS[name]((*loaded, scratch), value)
        except (MqadaptError, TypeError, OSError) as raised:
            error = raised
        if error is None:
            continue
        told = str(error)
        assert told and "panicked" not in told and len(told) < 1300, (value, error)
        if type(value) is int and not name.endswith((".ids", "stop_tokens")):
            assert not isinstance(error, TypeError), (value, error)
        if value == -1 and not isinstance(error, OSError):  # the argument is named
            assert isinstance(error, ArgumentError), (value, error)


RANGES = {
    "measure_prefill.tokens": (-1, "tokens must be a whole number from 1 to"),
    "measure_decode.depth": (
        -(2**70),
        "depth must be a whole number from 0 to 2**64 - 1; found -1180591620717411303424",
    ),
    "generate.max_new_tokens": (2**64, "max_new_tokens must be a whole number from 0 to"),
    "generate.top_k": (0, "top_k must be a whole number from 1 to"),
    "load.seed": (10**40, "seed must be a whole number from 0 to"),
    "load.max_tokens_in_flight": (2**63, "max_tokens_in_flight must be a whole number from 1 to 1048576; found 2**63"),
    "hidden_before": (-3, "layer_idx must be a whole number from 0 to"),
    "perplexity.context": (
        -(10**5000),
        "context must be a whole number from 2 to 2**64 - 1; found a negative number of",
    ),
    "convert.max_memory": (-1, "max_memory must be"),
    "Calibration.refine": (-1, "refine must be"),
    "bench.rounds": (-1, "rounds must be a whole number from 1 to"),
    "search.workers": (0, "workers must be a whole number from 1 to 4096; found 0"),
    "search.max_damage": (float("nan"), "max_damage must be a finite number"),
}


@pytest.mark.parametrize("name", RANGES)
def test_the_argument_and_its_range_are_named(name: str, loaded: tuple[mq.Model, Path], tmp_path: Path) -> None:
    value, words = RANGES[name]
    with pytest.raises(ArgumentError) as raised:
        CALLS[name]((*loaded, tmp_path), value)
    assert words.replace("2**63", str(2**63)) in str(raised.value)
    assert isinstance(raised.value, ValueError)


def test_more_tokens_than_memory(loaded: tuple[mq.Model, Path]) -> None:
    model = loaded[0]
    for call in (
        lambda: model.measure_prefill(2**63, 1),
        lambda: model.measure_prefill(10**9, 1),
        lambda: model.measure_decode(10**9, 1),
        lambda: model.measure_decode(2**63, 2**63),
        lambda: model.generate(IDS, 10**9),
    ):
        with pytest.raises(MqadaptError, match="out of memory while allocating a K/V cache for") as raised:
            call()
        assert type(raised.value) is MqadaptError
    # 197 GB of logits; where there is no memory for the cache either, that is said first
    with pytest.raises(
        MqadaptError,
        match=r"out of memory while allocating (196608000000 bytes for logits|a K/V cache for 1000000 tokens)",
    ):
        model.logits(np.zeros(10**6, dtype=np.int64))
    assert len(model.measure_prefill(3, 2)) == 2


TEXTS: dict[str, Callable[[Place, str], object]] = {
    "load.src": lambda at, s: mq.Model.load(s),
    "load.method": lambda at, s: mq.Model.load(at[1], "mqa:0", s),
    "load.dtype": lambda at, s: mq.Model.load(at[1], dtype=s),
    "load.device": lambda at, s: mq.Model.load(at[1], device=s),
    "load.weights": lambda at, s: mq.Model.load(at[1], weights=s),
    "load.precision": lambda at, s: mq.Model.load(at[1], precision=s),
    "with_plan": lambda at, s: at[0].with_plan(s),
    "Plan.parse": lambda at, s: mq.Plan.parse(s, at[1]),
    "from_json": lambda at, s: mq.ModelConfig.from_json(s),
    "convert.dst": lambda at, s: mq.convert(at[1], at[1] / "config.json" / s),
    "convert.method": lambda at, s: mq.convert(at[1], at[2] / "out", "mqa:0", s),
    "verify": lambda at, s: mq.verify(s),
    "Calibration.stats": lambda at, s: mq.Calibration(stats=s).predicted_errors(at[1], "mean", [(0, 1)]),
    "predicted_errors.method": lambda at, s: mq.Calibration([IDS]).predicted_errors(at[1], s, [(0, 1)]),
    "load_calibration": lambda at, s: load_calibration(at[1], s or "absent"),
    "token_ids": lambda at, s: texts.token_ids(texts.load_tokenizer(at[1]), s) and mq.Plan.parse("x", at[1]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_cannot_be(name: str, loaded: tuple[mq.Model, Path], tmp_path: Path) -> None:
    for text in ("\ud800", "a\udcffb", "\x1b[31m", "\0", "x" * (1 << 20), "[red]"):
        with pytest.raises((MqadaptError, OSError)) as raised:
            TEXTS[name]((*loaded, tmp_path), text)
        if isinstance(raised.value, MqadaptError):
            assert len(str(raised.value)) < 1300
            assert str(raised.value).isprintable()


@pytest.mark.parametrize("threads", ["100000", "0", "-1", "99999999999999999999999", "two\x1b[31m"])
def test_a_number_of_threads_that_cannot_be(lookalike: Path, threads: str) -> None:
    command = [sys.executable, "-m", "mqadapt_rs.cli", "bench", str(lookalike), "--prompt", "4", "--depth", "4"]
    environment = {**os.environ, "MQADAPT_NUM_THREADS": threads}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2, done.stderr
    assert "expected a whole number from 1 to 4096" in done.stderr and "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--prompt", "99999999999999"], 1, "out of memory while allocating a K/V cache for 99999999999999 tokens"),
        (["--depth", "99999999999999"], 1, "out of memory while allocating a K/V cache for"),
        (["--prompt", "9" * 30], 2, "prompts must be a whole number from 1 to"),
        (["--groups", "9" * 30], 2, ""),
        (["--steps", "9" * 18], 1, "out of memory"),
        (["--rounds", "9" * 30], 2, "rounds must be"),
        (["--prompt", "9" * 5000], 2, "is not a list of numbers separated by commas"),
    ],
)
def test_numbers_on_the_command_line(lookalike: Path, options: list[str], code: int, words: str) -> None:
    command = [sys.executable, "-m", "mqadapt_rs.cli", "bench", str(lookalike), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert words in " ".join(done.stderr.replace("│", " ").split())
    assert "please report it" not in done.stderr and "panicked" not in done.stderr
