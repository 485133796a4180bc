"""Long work: progress, exceptions in the callback, Ctrl-C, and the GIL."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import mqadapt_rs as mq
from mqadapt_rs import MqadaptError


def test_progress_is_reported_up_to_the_end(lookalike: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    mq.convert(lookalike, tmp_path / "out", "mqa:all", progress=lambda *args: seen.append(args))
    assert seen
    phase, done, total = seen[-1]
    assert phase == "convert"
    assert done == total > 0
    assert all(done <= total for _, done, total in seen)


def test_an_exception_in_the_callback_stops_the_work(lookalike: Path, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        mq.convert(lookalike, tmp_path / "out", "mqa:all", progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_an_exception_in_on_token_is_raised(lookalike: Path) -> None:
    def fail(*_: object) -> bool:
        raise ZeroDivisionError

    model = mq.Model.load(lookalike)
    with pytest.raises(ZeroDivisionError):
        model.generate([5, 6], max_new_tokens=5, on_token=fail)
    assert len(model.generate([5, 6], max_new_tokens=5, stop_tokens=[])) == 5


def test_on_token_ends_a_sequence(lookalike: Path) -> None:
    model = mq.Model.load(lookalike)
    seen: list[tuple[int, int]] = []

    def two(index: int, token: int) -> bool:
        seen.append((index, token))
        return index == 0 or sum(i == 1 for i, _ in seen) < 2

    first, second = model.generate([[5, 6], [7]], max_new_tokens=4, stop_tokens=[], on_token=two)
    assert len(first) == 4
    assert len(second) == 2
    assert [token for index, token in seen if index == 1] == second


def test_only_false_ends_a_sequence(lookalike: Path) -> None:
    model = mq.Model.load(lookalike)
    for answer, count in [(None, 4), (0, 4), ("", 4), (True, 4), (False, 1), (np.False_, 1)]:
        new = model.generate([5, 6], max_new_tokens=4, stop_tokens=[], on_token=lambda *_, answer=answer: answer)
        assert len(new) == count, answer


@pytest.mark.parametrize("callback", ["on_token", "progress"])
def test_a_callback_cannot_call_its_model(lookalike: Path, callback: str) -> None:
    model, other = mq.Model.load(lookalike), mq.Model.load(lookalike)
    calls = [lambda: model.logits([5]), model.kv_bytes, lambda: model.generate([5], max_new_tokens=1)]
    for call in calls:
        with pytest.raises(MqadaptError, match="a callback cannot call it"):
            model.generate([5, 6], max_new_tokens=4, stop_tokens=[], **{callback: lambda *_, call=call: call()})
    # another model can be called, and afterwards the model too
    options = {callback: lambda *_: other.logits([5]).any()}
    assert len(model.generate([5, 6], max_new_tokens=4, stop_tokens=[], **options)) == 4
    assert model.logits([5]).shape[0] == 1


def test_the_gil_is_free_meanwhile(lookalike: Path) -> None:
    model = mq.Model.load(lookalike)
    turns = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal turns
        while not stop.is_set():
            turns += 1
            time.sleep(0.001)

    other = threading.Thread(target=count)
    other.start()
    model.logits(list(range(500)))
    stop.set()
    other.join()
    assert turns > 3


@pytest.mark.parametrize("work", ["perplexity", "generate"])
def test_ctrl_c_stops_soon(lookalike: Path, work: str) -> None:
    code = f"""
import sys, time
import mqadapt_rs as mq
from mqadapt_rs import MqadaptError
model = mq.Model.load({str(lookalike)!r})
ids = list(range(1000, 41000))
print("ready", flush=True)
try:
    {"model.perplexity(ids, context=1000)" if work == "perplexity" else "model.generate(ids[:5], 20000, stop_tokens=[])"}
except KeyboardInterrupt:
    print("stopped", time.time(), flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(1)
    sent = time.time()
    process.send_signal(signal.SIGINT)
    word, at = process.stdout.readline().split()
    assert process.wait(30) == 0
    assert word == "stopped"
    # 0.2 s where a processor is free; the machines that run tests are shared
    assert float(at) - sent < 2


def test_ctrl_c_in_the_middle_of_a_conversion_leaves_nothing(lookalike: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal, mqadapt_rs as mq
mq.convert({str(lookalike)!r}, {str(tmp_path / "out")!r}, "mqa:all", progress=lambda *_: os.kill(os.getpid(), signal.SIGINT))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr
    assert os.listdir(tmp_path) == []  # noqa: PTH208
