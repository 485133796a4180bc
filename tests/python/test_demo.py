"""`mqadapt demo` from beginning to end, on a tiny model in place of the one that it downloads. CI runs the real one."""

import gzip
import itertools
import json
from pathlib import Path

import pytest

import tiny
from mqadapt_rs import demo

TEXT = "the meal was good and then they went home with a very old friend who had seen nothing like it before"
WORDS = TEXT.split()


def _sentence(seed: int, words: int) -> str:
    return " ".join(WORDS[(seed * 7 + at * (1 + seed % 5)) % len(WORDS)] for at in range(words))


def _write(path: Path, records: list[dict[str, object]]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as out:
        out.writelines(json.dumps(record) + "\n" for record in records)
    return path


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the demo downloads: a model of eight layers with a tokenizer, questions, and passages."""
    model = tmp_path / "packaged"
    size = tiny.save_tokenizer(tmp_path, TEXT * 3)
    tiny.save(model, "llama", dtype="bfloat16", vocab_size=size, num_hidden_layers=8)
    tiny.save_tokenizer(model, TEXT * 3)
    questions = [
        {
            "idx": end,
            "doc": {"query": _sentence(doc, 9), "choices": [_sentence(doc + i, 4) for i in range(4)], "gold": 0},
        }
        for doc, end in itertools.product(range(6), range(4))
    ]
    passages = [{"doc": {"query": _sentence(doc, 60), "choices": ["home"]}} for doc in range(200)]
    files = {
        demo.MODEL: model,
        demo.HELLASWAG: _write(tmp_path / "hellaswag.jsonl.gz", questions),
        demo.LAMBADA: _write(tmp_path / "lambada.jsonl.gz", passages),
    }
    monkeypatch.setattr(demo, "fetch", lambda wanted, folder: [files[file] for file in wanted])


def test_every_plan_and_method_has_an_outcome(packaged: None, tmp_path: Path) -> None:
    said: list[str] = []
    plans, methods = ("mqa:last4", "mqa:alternate2"), ("mean", "first", "prune", "closed-form")
    outcomes = demo.run(tmp_path / "demo", plans=plans, methods=methods, questions=6, windows=2, say=said.append)
    assert [(o.plan, o.method) for o in outcomes] == [("keep", ""), *itertools.product(plans, methods)]
    source = outcomes[0]
    for outcome in outcomes:
        assert (outcome.folder / "mqadapt.json").exists()
        assert 1.0 < outcome.perplexity < 1e9
        assert 0.0 <= outcome.hellaswag <= 1.0
        assert sum(outcome.num_key_value_heads) < 8 * 6 or outcome is source
    assert any("by the plan mqa:last4 and the method mean" in line for line in said)


def test_a_second_run_replaces_the_first(packaged: None, tmp_path: Path) -> None:
    for _ in range(2):
        outcomes = demo.run(tmp_path / "demo", plans=("mqa:last4",), methods=("mean",), windows=1)
    assert len(outcomes) == 2
    assert all(outcome.hellaswag is None and outcome.hellaswag_stderr is None for outcome in outcomes)
