"""Damage of merged K/V heads in small models: a model is trained here, merged and measured.

    python benches/small_model.py /tmp/qwen3 ../shared/data/text/wikitext2_raw_valid_documents.jsonl.gz --field page \
        --more ../shared/data/text/tinyshakespeare.txt --shape qwen3

In: a text; documents of its last quarter are measured, the rest is for training and calibration, `--more` for training only.
Out: a folder with the trained model, kept for the next run, and a table: the increase of log-perplexity of every plan and
method, also as a share of that of `mean`. `--shape` chooses between the shapes below. Training needs PyTorch and transformers.

    python benches/small_model.py FOLDER --sampled

measures a model for which there is no text, on texts that it generates itself (temperature 1): with those its perplexity is
the lowest that any model can have, so that every increase is damage.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np

from mqadapt_rs import Calibration, Model, text
from mqadapt_rs.calibration import draw_windows

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3": {"model_type": "qwen3", "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    "qwen3-wide": {"model_type": "qwen3", "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64},
    "olmo2": {"model_type": "olmo2", "num_attention_heads": 4, "num_key_value_heads": 4},
    "llama-mha": {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32},
}
SIZE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 6,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONTEXT = 256
BATCH = 8
PLANS = ("mqa:all", "gqa2:all", "mqa:1,3,5", "mqa:last2")
METHODS = ("mean", "closed-form", "closed-form --sequential")
CALIBRATION_TOKENS = 16384
MEASURED_TOKENS = 16384


def save_tokenizer(folder: Path, words: str) -> None:
    """A byte-level BPE tokenizer trained on `words`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE["vocab_size"],
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([words], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def train(folder: Path, ids: list[int], shape: str, steps: int) -> None:
    """Trains a model on `ids` with AdamW, and saves it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**SIZE, **SHAPES[shape])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.004, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30, 2.0 * (1 - step / steps) + 0.01)
    )
    pool = torch.tensor(ids)
    begun = time.perf_counter()
    for step in range(steps):
        starts = torch.randint(len(ids) - CONTEXT, (BATCH,))
        batch = torch.stack([pool[start : start + CONTEXT] for start in starts.tolist()])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} of {steps}, loss {loss.item():.3f}, {time.perf_counter() - begun:.0f} s", flush=True)
    model.save_pretrained(folder)


def bigram_loss(ids: list[int], measured: list[int]) -> float:
    """Loss on `measured` of a bigram model of `ids`, smoothed by its unigrams: what a model without attention reaches."""
    singles = np.bincount(ids, minlength=SIZE["vocab_size"]) + 0.1
    pairs = np.zeros((SIZE["vocab_size"], SIZE["vocab_size"]))
    np.add.at(pairs, (ids[:-1], ids[1:]), 1.0)
    pairs += 20.0 * singles / singles.sum()
    probabilities = pairs / pairs.sum(1, keepdims=True)
    return float(-np.log(probabilities[measured[:-1], measured[1:]]).mean())


def sampled(model: Model, count: int, seed: int) -> list[int]:
    """`count` tokens of texts that the model continues from its first token (1) at temperature 1."""
    texts = model.generate(
        [[1]] * (count // CONTEXT), max_new_tokens=CONTEXT - 1, temperature=1.0, seed=seed, stop_tokens=[]
    )
    return [token for text in texts for token in [1, *text]]


class Table:
    """Measures plans and methods on a model."""

    def __init__(self, base: Model, pool: list[int], measured: list[int]) -> None:
        """Measures the model as it is."""
        self.base = base
        self.drawn = draw_windows(pool, tokens=CALIBRATION_TOKENS, context=CONTEXT, seed=0)
        self.measured = measured
        self.loss = math.log(self.base.perplexity(measured, CONTEXT))

    def increase(self, plan: str, method: str) -> tuple[float, float]:
        """Increase of log-perplexity, and seconds of the merge."""
        name, *options = method.split()
        calibration = None if name == "mean" else Calibration(self.drawn, sequential="--sequential" in options)
        begun = time.perf_counter()
        model = self.base.with_plan(plan, name, calibration=calibration)
        seconds = time.perf_counter() - begun
        return math.log(model.perplexity(self.measured, CONTEXT)) - self.loss, seconds

    def show(self, plans: list[str], methods: list[str]) -> None:
        """Prints the table."""
        print(f"perplexity {math.exp(self.loss):.3f}, log {self.loss:.4f}\n")
        print("| plan | method | increase | share of mean's | seconds |\n|---|---|---|---|---|")
        for plan in plans:
            mean = self.increase(plan, "mean")[0]
            for method in methods:
                more, seconds = self.increase(plan, method)
                print(f"| `{plan}` | {method} | {more:.4f} | {more / mean:.1%} | {seconds:.1f} |", flush=True)


def main() -> None:
    """Trains the model where it is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--sampled", action="store_true", help="measure an existing folder on texts that it generates")
    parser.add_argument("--field", default="text")
    parser.add_argument("--more", type=Path, action="append", default=[], help="plain text to train on as well")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--plans", nargs="+", default=PLANS)
    parser.add_argument("--methods", default=",".join(METHODS), help="as on the command line, joined by commas")
    arguments = parser.parse_args()
    if arguments.sampled == (arguments.text is not None):
        parser.error("name a text, or --sampled")
    pool, measured = texts_of(arguments) if arguments.text else ([], [])
    base = Model.load(arguments.folder, dtype="float32", precision="exact")
    if arguments.sampled:
        pool, measured = sampled(base, CALIBRATION_TOKENS, 1), sampled(base, MEASURED_TOKENS, 2)
    Table(base, pool, measured).show(arguments.plans, arguments.methods.split(","))


def texts_of(arguments: argparse.Namespace) -> tuple[list[int], list[int]]:
    """Tokens to calibrate with and to measure; the model is trained where it is missing."""
    documents = list(text.read_documents(arguments.text, arguments.field))
    cut = 3 * len(documents) // 4
    words = "".join(documents[:cut])
    more = "".join(path.read_text() for path in arguments.more)
    if not (arguments.folder / "tokenizer.json").exists():
        save_tokenizer(arguments.folder, words + more)
    tokenizer = text.load_tokenizer(arguments.folder)
    pool = text.token_ids(tokenizer, words)
    everything = pool + text.token_ids(tokenizer, more)
    if not (arguments.folder / "config.json").exists():
        train(arguments.folder, everything, arguments.shape, arguments.steps)
    measured = text.token_ids(tokenizer, "".join(documents[cut:]))[:MEASURED_TOKENS]
    print(f"log-perplexity of a bigram model {bigram_loss(everything, measured):.3f}")
    return pool, measured


if __name__ == "__main__":
    main()
