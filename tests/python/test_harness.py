"""The lm-eval model against lm-eval's own `hf` backend on the same tiny checkpoint: same tokens, same windows, same answers.

Log-likelihoods agree to 1e-3, the tolerance of the issue; both sides compute in f32, and texts here have up to 200 tokens.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import tiny
from mqadapt_rs import ArgumentError, convert
from mqadapt_rs.lm_eval import MqadaptLM, evaluate

TEXT = (
    "The quick brown fox jumps over the lazy dog. A small model reads a short text, and says how likely it is; "
    "numbers such as 12, 345 and 6789 too.\nQuestion: what comes next?\nAnswer: nobody knows, café ☕ naïve.\n"
) * 3
MAX_LENGTH = 96


@pytest.fixture(scope="module", params=["plain", "bos"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer: one that adds nothing by itself, and one that starts every text with BOS."""
    folder = tmp_path_factory.mktemp("harness") / "model"
    vocab_size = tiny.save_tokenizer(folder, TEXT, starts_with_bos=request.param == "bos")
    tiny.save(folder, "llama", vocab_size=vocab_size, num_key_value_heads=3, max_position_embeddings=MAX_LENGTH)
    return folder


def requests(kind: str, args: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=0, metadata=("t", i, 1)) for i, a in enumerate(args)]


def assert_same_scores(ours: list[tuple[float, bool]], theirs: list[tuple[float, bool]]) -> None:
    assert [score for score, _ in ours] == pytest.approx([score for score, _ in theirs], abs=1e-3)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


PAIRS = [
    ("The quick brown", " fox jumps"),
    ("The quick brown ", "fox"),  # the space belongs to the continuation
    ("The quick brown", " dog"),
    ("", "A text without a context"),
    ("Question: what comes next?\nAnswer:", " nobody"),
    ("Question: what comes next?\nAnswer:", " 42"),
    ("<s>The text starts with BOS", " already"),
    (TEXT, " is longer than the model's context"),
    ("short", " " + TEXT[:150]),
    ("The quick brown", " fox jumps"),  # once more
]


@pytest.mark.parametrize("options", [{}, {"add_bos_token": True}, {"max_length": 50}, {"prefix_token_id": 7}], ids=str)
def test_loglikelihood(checkpoint: Path, options: dict[str, Any]) -> None:
    ours = MqadaptLM(str(checkpoint), **options)
    theirs = HFLM(str(checkpoint), device="cpu", dtype="float32", batch_size=4, **options)
    pairs = [pair for pair in PAIRS if len(ours.tok_encode(pair[1])) < ours.max_length]
    assert len(pairs) >= 8
    made = requests("loglikelihood", pairs)
    assert_same_scores(ours.loglikelihood(made, disable_tqdm=True), theirs.loglikelihood(made, disable_tqdm=True))


@pytest.mark.parametrize("options", [{}, {"max_length": 33}], ids=str)
def test_loglikelihood_rolling(checkpoint: Path, options: dict[str, Any]) -> None:
    ours = MqadaptLM(str(checkpoint), **options)
    theirs = HFLM(str(checkpoint), device="cpu", dtype="float32", batch_size=1, **options)
    made = requests("loglikelihood_rolling", [("A short one.",), (TEXT,), (TEXT[:333],), ("<s>" + TEXT[:40],)])
    wanted = theirs.loglikelihood_rolling(made, disable_tqdm=True)
    # up to 200 log-likelihoods a sum
    assert ours.loglikelihood_rolling(made, disable_tqdm=True) == pytest.approx(wanted, abs=1e-3)


GENERATIONS = [
    {"until": ["\n"], "max_gen_toks": 20},
    {"until": [" the", ","], "max_gen_toks": 30, "do_sample": False},
    {"until": "e", "max_new_tokens": 25, "temperature": 0.0},
    {"max_gen_toks": 90, "until": ["<|user|>"]},  # leaves a context of six tokens
]


@pytest.mark.parametrize("gen_kwargs", GENERATIONS, ids=str)
def test_generate_until(checkpoint: Path, gen_kwargs: dict[str, Any]) -> None:
    ours = MqadaptLM(str(checkpoint))
    theirs = HFLM(str(checkpoint), device="cpu", dtype="float32", batch_size=1)
    contexts = ["The quick", "Question: what comes next?\nAnswer:", TEXT, "numbers such as"]
    made = requests("generate_until", [(context, dict(gen_kwargs)) for context in contexts])
    wanted = theirs.generate_until(made, disable_tqdm=True)
    assert ours.generate_until(made, disable_tqdm=True) == wanted


def test_sampling_is_seeded(checkpoint: Path) -> None:
    lm = MqadaptLM(str(checkpoint))

    def sample(**options: Any) -> list[str]:
        kwargs = {"max_gen_toks": 24, "do_sample": True, "temperature": 1.0, **options}
        return lm.generate_until(requests("generate_until", [("The", kwargs), ("The", kwargs)]), disable_tqdm=True)

    first, second = sample()
    assert first != second  # two draws for one context
    assert sample() == [first, second]
    assert sample(seed=1) != [first, second]
    assert sample(top_k=1) == sample(temperature=0.0, do_sample=False)


def test_options_that_cannot_be_honoured(checkpoint: Path) -> None:
    lm = MqadaptLM(str(checkpoint))
    with pytest.raises(ArgumentError, match="num_beams"):
        lm.generate_until(requests("generate_until", [("The", {"num_beams": 4, "max_gen_toks": 8})]))
    with pytest.raises(ArgumentError, match="max_gen_toks 96"):
        lm.generate_until(requests("generate_until", [("The", {"max_gen_toks": 96})]))
    with pytest.raises(ArgumentError, match=r"'3-7'.*commas"):
        MqadaptLM.create_from_arg_string(f"pretrained={checkpoint},plan=mqa:0,3-7")
    with pytest.raises(ArgumentError, match="at most 96"):
        lm.loglikelihood(requests("loglikelihood", [("The", " " + TEXT)]))


def test_arguments_of_lm_eval(checkpoint: Path) -> None:
    text = f"pretrained={checkpoint},plan=mqa:0;gqa3:1,method=first,dtype=float32"
    extra = {"batch_size": 8, "max_batch_size": 64, "device": "cpu"}
    lm = get_model("mqadapt").create_from_arg_string(text, extra)
    assert isinstance(lm, MqadaptLM)
    assert lm.model.config.num_key_value_heads == [1, 3, 3]
    info = lm.get_model_info()
    assert info["num_key_value_heads"] == [1, 3, 3]
    assert info["merge_method"] == "first"
    assert info["model_sha"] == lm.model.fingerprint
    json.dumps(info)
    assert get_model("hf") is HFLM  # the others are still there


def test_chat_template(checkpoint: Path) -> None:
    ours = MqadaptLM(str(checkpoint))
    theirs = HFLM(str(checkpoint), device="cpu", dtype="float32")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(chat) == "<|system|>Be brief.</s><|user|>Hello</s><|assistant|>"
    answered = [*chat, {"role": "assistant", "content": "So"}]
    for messages, prompt in ((chat, True), (answered, False)):
        assert ours.apply_chat_template(messages, prompt) == theirs.apply_chat_template(messages, prompt)
    assert ours.chat_template(True) == theirs.chat_template(True) == tiny.CHAT_TEMPLATE
    assert ours.tokenizer_name == theirs.tokenizer_name


# Whole evaluations. The task asks for the number that follows, with a chat template and few-shot examples where told.


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"q": f"what follows {i}?", "options": [f"{i + 1}", f"{i * 7}", "none of them"], "gold": i % 3}
        for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = [
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{validation: {folder / 'rows.jsonl'}}}}}",
        "validation_split: validation",
        "fewshot_split: validation",
        'doc_to_text: "Question: {{q}}\\nAnswer:"',
    ]
    choice = ["task: tiny_choice", "output_type: multiple_choice", "doc_to_choice: options", "doc_to_target: gold"]
    choice += ["metric_list: [{metric: acc}, {metric: acc_norm}]"]
    write = ["task: tiny_write", "output_type: generate_until", 'doc_to_target: "{{options[0]}}"']
    write += ['generation_kwargs: {until: ["\\n"], max_gen_toks: 8}', "metric_list: [{metric: exact_match}]"]
    (folder / "choice.yaml").write_text("\n".join(common + choice) + "\n")
    (folder / "write.yaml").write_text("\n".join(common + write) + "\n")
    return folder


def answers(results: dict[str, Any]) -> dict[str, list[Any]]:
    return {task: [sample["resps"] for sample in samples] for task, samples in results["samples"].items()}


@pytest.mark.parametrize(
    "options",
    [{}, {"num_fewshot": 2}, {"apply_chat_template": True, "num_fewshot": 1, "fewshot_as_multiturn": True}],
    ids=str,
)
def test_evaluation_equals_hf(checkpoint: Path, tasks: Path, options: dict[str, Any]) -> None:
    names = ["tiny_choice", "tiny_write"]
    ours = evaluate(MqadaptLM(str(checkpoint), max_length=1024), names, include_path=tasks, log_samples=True, **options)
    reference = HFLM(str(checkpoint), device="cpu", dtype="float32", max_length=1024)
    theirs = evaluate(reference, names, include_path=tasks, log_samples=True, **options)
    for task in names:
        own, other = ours["results"][task], theirs["results"][task]
        assert {k: v for k, v in own.items() if k != "alias"} == {k: v for k, v in other.items() if k != "alias"}
    own, other = answers(ours), answers(theirs)
    assert own["tiny_write"] == other["tiny_write"]
    for mine, yours in zip(own["tiny_choice"], other["tiny_choice"], strict=True):
        assert_same_scores([x for [x] in mine], [x for [x] in yours])


def test_cache_keeps_plans_apart(
    checkpoint: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    original = MqadaptLM._loglikelihood_tokens
    monkeypatch.setattr(
        MqadaptLM,
        "_loglikelihood_tokens",
        lambda self, requests, *args, **kwargs: (
            computed.append(len(requests)) or original(self, requests, *args, **kwargs)
        ),
    )
    kept, merged = MqadaptLM(str(checkpoint)), MqadaptLM(str(checkpoint), plan="mqa:all")

    manager = TaskManager(include_path=str(tasks), include_defaults=False)

    def run(lm: MqadaptLM, cache: str | None) -> dict[str, list[Any]]:
        own = {"task_manager": manager, "torch_random_seed": None, "bootstrap_iters": 0}
        return answers(simple_evaluate(model=lm, tasks=["tiny_choice"], use_cache=cache, **own))

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda storage: None)  # seconds each time

    cache = str(tmp_path / "answers")
    wanted = [run(lm, None) for lm in (kept, merged)]
    assert wanted[0] != wanted[1]
    computed.clear()
    assert [run(lm, cache) for lm in (kept, merged)] == wanted
    assert computed == [36, 36]
    again = [MqadaptLM(str(checkpoint)), MqadaptLM(str(checkpoint), plan=[1, 1, 1])]  # the same two, loaded anew
    assert [run(lm, cache) for lm in again] == wanted
    assert computed == [36, 36]  # all from the cache
    run(MqadaptLM(str(checkpoint), plan=[1, 1, 1], method="first"), cache)
    run(MqadaptLM(str(checkpoint), add_bos_token=True), cache)
    assert computed == [36] * 4


def test_answers_reach_the_cache_one_by_one(checkpoint: Path) -> None:
    lm = MqadaptLM(str(checkpoint))
    seen: list[tuple[str, Any, Any]] = []
    lm.cache_hook.add_partial = lambda attr, args, answer: seen.append((attr, tuple(args), answer))
    scores = lm.loglikelihood(requests("loglikelihood", PAIRS[:4]))
    rolling = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [("A text.",)]))
    kwargs = {"until": ["\n"], "max_gen_toks": 4}
    texts = lm.generate_until(requests("generate_until", [("The", kwargs)]))
    wanted = [("loglikelihood", pair, score) for pair, score in zip(PAIRS[:4], scores, strict=True)]
    wanted += [("loglikelihood_rolling", ("A text.",), rolling[0]), ("generate_until", ("The", kwargs), texts[0])]
    assert sorted(seen, key=str) == sorted(wanted, key=str)


def test_overlay_scores_as_the_converted_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "converted", plan="mqa:0,2")
    made = requests("loglikelihood", PAIRS[:6])
    overlay = MqadaptLM(str(checkpoint), plan="mqa:0,2").loglikelihood(made)
    assert MqadaptLM(str(tmp_path / "converted")).loglikelihood(made) == overlay


def test_unknown_tasks(checkpoint: Path, tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # without lm-eval's own tasks, which take long to read
    own = TaskManager(include_path=str(tasks), include_defaults=False)
    monkeypatch.setattr("mqadapt_rs.lm_eval.run._read_tasks", lambda *args, **kwargs: own)
    with pytest.raises(ArgumentError, match="no_such_task"):
        evaluate(MqadaptLM(str(checkpoint)), ["tiny_choice", "no_such_task"], include_path=tasks)
    with pytest.raises(ArgumentError, match="none given"):
        evaluate(MqadaptLM(str(checkpoint)), [])


def test_without_a_gpu(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    """lm-eval's command line asks for `cuda:0` by default."""
    lm = MqadaptLM(str(checkpoint), device="cuda:9")
    assert "device cuda:9 is not available, using the CPU" in caplog.text
    assert lm.loglikelihood(requests("loglikelihood", PAIRS[:1])) == MqadaptLM(str(checkpoint)).loglikelihood(
        requests("loglikelihood", PAIRS[:1])
    )
    with pytest.raises(ArgumentError, match="tpu"):
        MqadaptLM(str(checkpoint), device="tpu")


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run() -> Run:
    """Starts `mqadapt` in a process of its own."""

    def start(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mqadapt_rs.cli", *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)

    return start


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["plain"], indirect=True)
def test_three_ways_in(checkpoint: Path, tasks: Path, tmp_path: Path, run: Run) -> None:
    """As an instance, by `mqadapt eval` and by `mqadapt lm-eval` with a cache: the same metrics, and no PyTorch of ours."""
    plan = "mqa:0;mqa:2"
    instance = evaluate(MqadaptLM(str(checkpoint), plan=plan), ["tiny_choice"], include_path=tasks, limit=6)
    wanted = {key: value for key, value in instance["results"]["tiny_choice"].items() if key.startswith("acc")}
    done = run(
        "eval", checkpoint, "--tasks", "tiny_choice", "--plan", plan, "--include-path", tasks, "--limit", 6, "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"]["tiny_choice"].items() >= wanted.items()
    arguments = ["--model", "mqadapt", "--model_args", f"pretrained={checkpoint},plan={plan}", "--tasks", "tiny_choice"]
    arguments += [
        "--include_path",
        tasks,
        "--limit",
        6,
        "--use_cache",
        tmp_path / "cache",
        "--output_path",
        tmp_path / "out",
    ]
    done = run("lm-eval", *arguments)
    assert done.returncode == 0, done.stderr
    [written] = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(written.read_text())["results"]["tiny_choice"].items() >= wanted.items()


def test_no_pytorch(checkpoint: Path) -> None:
    script = (
        "import sys\n"
        "from mqadapt_rs.lm_eval import MqadaptLM\n"
        "lm = MqadaptLM(sys.argv[1])\n"
        "lm.apply_chat_template([{'role': 'user', 'content': 'Hello'}])\n"
        "lm._loglikelihood_tokens([(None, lm.tok_encode('The quick'), lm.tok_encode(' fox'))])\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(checkpoint)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
