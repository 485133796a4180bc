"""Calibration text: which windows are drawn, and what is said of too little."""

from __future__ import annotations

import inspect
import random
import warnings
from collections import Counter
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import pytest

from mqadapt_rs import ArgumentError, Calibration, load_calibration
from mqadapt_rs.calibration import ENOUGH_TOKENS, CalibrationOptions, draw_windows
from mqadapt_rs.cli.convert import convert
from mqadapt_rs.search import search

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_windows_do_not_overlap_and_follow_the_seed() -> None:
    ids = list(range(10_005))
    windows = draw_windows(ids, tokens=400, context=100, seed=1)
    assert [len(window) for window in windows] == [100] * 4
    assert all(window == list(range(window[0], window[0] + 100)) for window in windows)
    starts = [window[0] for window in windows]
    assert starts == sorted(set(starts)) and all(start % 100 == 0 for start in starts)
    assert windows == draw_windows(ids, tokens=400, context=100, seed=1)
    assert windows != draw_windows(ids, tokens=400, context=100, seed=2)


def test_a_short_text_is_taken_whole() -> None:
    assert draw_windows(list(range(250)), tokens=1000, context=100, seed=0) == [
        list(range(100)),
        list(range(100, 200)),
    ]
    with pytest.raises(ArgumentError, match="99 tokens, less than one window of 100"):
        draw_windows(list(range(99)), tokens=1000, context=100, seed=0)


def covered(windows: list[list[int]]) -> list[int]:
    """The ids of windows of a text that counts; they follow each other, and none is there twice."""
    assert all(window == list(range(window[0], window[0] + len(window))) for window in windows)
    ids = [one for window in windows for one in window]
    assert ids == sorted(set(ids))
    return ids


def test_several_lengths_share_the_tokens() -> None:
    ids = list(range(120_000))
    windows = draw_windows(ids, tokens=16384, context=(512, 2048), seed=0)
    assert len(covered(windows)) == 16384
    assert Counter(map(len, windows)) == {512: 16, 2048: 4}
    assert windows == draw_windows(ids, tokens=16384, context=[2048, 512, 512], seed=0)
    assert windows != draw_windows(ids, tokens=16384, context=(512, 2048), seed=1)
    for context in ((256, 512, 1024, 2048), (300, 700), (7, 1000)):
        drawn = covered(draw_windows(ids, tokens=16384, context=context, seed=3))
        assert 0.95 * 16384 <= len(drawn) <= 16384


@pytest.mark.parametrize("seed", range(5))
def test_they_come_from_many_documents(seed: int) -> None:
    """Of 30 documents of one length, 20 windows see far more than windows of a row would, and the ends of the text."""
    ids = list(range(120_000))
    windows = draw_windows(ids, tokens=16384, context=(512, 2048), seed=seed)
    documents = {one // 4000 for window in windows for one in window}
    assert len(documents) >= 17
    starts = [window[0] for window in windows if len(window) == 2048]
    assert all(30_000 * nth - 2048 <= start < 30_000 * (nth + 1) for nth, start in enumerate(starts))


def test_lengths_that_a_text_has_no_room_for_are_left_out() -> None:
    def lengths(found: int, **options: Any) -> Counter[int]:
        windows = draw_windows(list(range(found)), **{"tokens": 16384, "context": (512, 2048), "seed": 0, **options})
        covered(windows)
        return Counter(map(len, windows))

    assert lengths(2000) == {512: 3}
    assert lengths(2100) == {2048: 1}
    assert lengths(5000) == {2048: 1, 512: 5}
    assert lengths(16384) == {2048: 4, 512: 16}
    # at least one of each length, however few tokens
    assert lengths(9000, tokens=100) == {2048: 1, 512: 1}
    with pytest.raises(ArgumentError, match=r"511 tokens, less than one window of 512.*--calibration-context"):
        lengths(511)
    for context in ((), (0, 512), -1):
        with pytest.raises(ArgumentError, match="calibration_context"):
            lengths(5000, context=context)


def test_the_windows_of_one_length_are_those_of_earlier_versions() -> None:
    windows = draw_windows(list(range(120_000)), tokens=2048, context=512, seed=0)
    chosen = sorted(random.Random(0).sample(range(120_000 // 512), 4))
    assert [window[0] for window in windows] == [512 * at for at in chosen]


def test_a_calibration_knows_its_text() -> None:
    one = Calibration([[1, 2, 3], [4, 5]], target_context=[2])
    assert one.tokens == 5
    assert one.fingerprint == Calibration([[1, 2, 3], [4, 5]], target_context=[2]).fingerprint
    assert one.fingerprint != Calibration([[1, 2], [3, 4, 5]], target_context=[2]).fingerprint
    with pytest.raises(ArgumentError, match="target_context"):
        Calibration([[1]], target_context=[])
    assert one.context == [2, 3]
    assert one.target_context == [2]


def test_target_contexts_are_no_longer_than_the_windows() -> None:
    def of(*lengths: int) -> list[list[int]]:
        return [[1] * length for length in lengths]

    assert Calibration(of(512, 2048)).target_context == [512, 2048]
    assert Calibration(of(512, 1000)).target_context == [512]
    assert Calibration(of(256, 64)).target_context == [256]
    assert Calibration().target_context == [512, 2048]
    with pytest.raises(ArgumentError, match=r"target_context is 2048 tokens.* has 256.*--calibration-context"):
        Calibration(of(256, 64), target_context=[64, 2048])


@pytest.fixture
def tokens_of_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int], Path]:
    """A text of so many tokens, for a model without weights."""
    from mqadapt_rs import text

    file = tmp_path / "some.txt"
    file.write_text("a few words", encoding="utf-8")
    monkeypatch.setattr(text, "load_tokenizer", lambda _src: None)

    def of(count: int) -> Path:
        monkeypatch.setattr(text, "token_ids", lambda _tokenizer, _text: list(range(count)))
        return file

    return of


def test_by_default_there_are_windows_for_short_and_long_contexts(tokens_of_text: Callable[[int], Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration = load_calibration("model", tokens_of_text(50_000))
    assert (calibration.tokens, calibration.context, calibration.target_context) == (24576, [512, 2048], [512, 2048])
    file = tokens_of_text(1500)
    message = "1500 tokens, too few for windows of 2048 tokens; only windows of 512 tokens"
    with pytest.warns(UserWarning, match=message), pytest.warns(UserWarning, match="are few"):
        calibration = load_calibration("model", file)
    assert (calibration.tokens, calibration.context, calibration.target_context) == (1024, [512], [512])
    with (
        pytest.warns(UserWarning, match=message),
        pytest.warns(UserWarning, match="are few"),
        pytest.raises(ArgumentError, match="target_context is 2048 tokens"),
    ):
        load_calibration("model", file, target_context=[2048])
    with pytest.warns(UserWarning, match="are few"):
        assert load_calibration("model", file, context=256).target_context == [256]


def test_enough_is_the_number_the_warning_names(tokens_of_text: Callable[[int], Path]) -> None:
    with pytest.warns(UserWarning, match=f"3000 tokens .* {ENOUGH_TOKENS} or more"):
        calibration = load_calibration("model", tokens_of_text(3000), context=1000)
    assert calibration.tokens == 3000
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_calibration("model", tokens_of_text(ENOUGH_TOKENS), context=1024)
    with pytest.raises(ArgumentError, match="--stats"):
        load_calibration("model", None)


def test_all_signatures_have_the_options_of_the_type() -> None:
    """`load_calibration`, `search` and the commands take the fields of `CalibrationOptions`, with the same defaults."""
    loading, searching = (inspect.signature(f).parameters for f in (load_calibration, search))
    command = inspect.signature(convert).parameters
    for field in fields(CalibrationOptions):
        name = field.metadata["name"]
        if field.name != "text":
            assert loading[field.name].default == field.default, field.name
        assert searching[name].default == field.default, name
        default = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        assert command[name].default == default, name
    assert set(CalibrationOptions().keywords()) <= set(searching) & set(command)


def test_options_of_a_command_line_read_back() -> None:
    assert CalibrationOptions().command_line() == {}
    options = CalibrationOptions("text.txt", "page", 1024, (64, 128), (32,), "saved", sequential=True, refine=3)
    assert CalibrationOptions.from_keywords(options.keywords()) == options
    assert options.command_line() == {
        "calibration": "text.txt",
        "calibration-field": "page",
        "calibration-tokens": 1024,
        "calibration-context": "64,128",
        "target-context": "32",
        "stats": "saved",
        "sequential": True,
        "refine": 3,
    }
