"""Calibration text: which windows are drawn, and what is said of too little."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pytest

from mqadapt_rs import ArgumentError, Calibration
from mqadapt_rs.calibration import ENOUGH_TOKENS, draw_windows

if TYPE_CHECKING:
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


def test_a_calibration_knows_its_text() -> None:
    one = Calibration([[1, 2, 3], [4, 5]], target_context=[2])
    assert one.tokens == 5
    assert one.fingerprint == Calibration([[1, 2, 3], [4, 5]], target_context=[2]).fingerprint
    assert one.fingerprint != Calibration([[1, 2], [3, 4, 5]], target_context=[2]).fingerprint
    with pytest.raises(ArgumentError, match="target_context"):
        Calibration([[1]], target_context=[])


def test_enough_is_the_number_the_warning_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mqadapt_rs import load_calibration, text

    file = tmp_path / "few.txt"
    file.write_text("a few words", encoding="utf-8")
    monkeypatch.setattr(text, "load_tokenizer", lambda _src: None)
    monkeypatch.setattr(text, "token_ids", lambda _tokenizer, _text: list(range(3000)))
    with pytest.warns(UserWarning, match=f"3000 tokens .* {ENOUGH_TOKENS} or more"):
        calibration = load_calibration("model", file, context=1000)
    assert calibration.tokens == 3000
    monkeypatch.setattr(text, "token_ids", lambda _tokenizer, _text: list(range(ENOUGH_TOKENS)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_calibration("model", file, context=1024)
    with pytest.raises(ArgumentError, match="--stats"):
        load_calibration("model", None)
