"""GGUF tokenizers of the byte-level kind: ids for each `tokenizer.ggml.pre` are those of the published pre-tokenizers.

In: a small BPE vocabulary that is trained here across the borders of words, so that every cut shows, written into GGUF files.
Out: the ids of the rebuilt `tokenizer.json`, against cuts by the package `regex` and merges in Python, and against the classes of
transformers that build such a tokenizer themselves.
"""

from __future__ import annotations

import functools
import json
import unicodedata
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import tiny
from hard_text import hard_texts, training_lines
from mqadapt_rs import _core

pytest.importorskip("gguf", reason="the package gguf (extra `test`) is not installed")
regex = pytest.importorskip("regex", reason="the package regex (it comes with transformers) is not installed")

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
USER_DEFINED = ("<tool>", "    ", "naïve")
# words that no merge makes: only tokenizers that look a word up before they merge give them
WHOLE_WORDS = (" HTTPServer", "Zażółć", "1234")

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?"
O200K = rf"{WORD}{UPPER}*{LOWER}+{SUFFIX}|{WORD}{UPPER}+{LOWER}*{SUFFIX}|\p{{N}}{{1,3}}|{REST}"
TEKKEN = rf"{WORD}{UPPER}*{LOWER}+|{WORD}{UPPER}+{LOWER}*|\p{{N}}|{REST}"


class Published(NamedTuple):
    """How a published tokenizer cuts text: one expression after the other, each on what the ones before left."""

    expressions: tuple[str, ...]
    nfc: bool = False
    whole_words: bool = False


PUBLISHED = {
    "gpt-2": Published((GPT2,)),
    "smollm": Published((r"\p{N}", GPT2)),
    "refact": Published((r"\p{N}", GPT2)),  # Granite
    "olmo": Published((GPT2,), nfc=True),
    "qwen2": Published((CL100K.replace("{1,3}", ""),), nfc=True),
    "llama-bpe": Published((CL100K,), whole_words=True),
    "smaug-bpe": Published((CL100K,)),  # SmolLM3
    "dbrx": Published((CL100K,)),  # Phi-4
    "gpt-4o": Published((O200K,)),  # Phi-4-mini
    "tekken": Published((TEKKEN,), whole_words=True),
    # of llama.cpp itself, for models of which it knows no better
    "default": Published((r"[\p{P}\$\+<=>\^~\|]+", GPT2.removesuffix(r"|\s+"), r"\p{N}+", "[0-9][0-9][0-9]")),
}


class Vocabulary(NamedTuple):
    """Tokens by id, in GPT-2's printable characters, and merges."""

    tokens: list[str]
    kinds: list[int]
    merges: list[str]


@functools.cache
def _byte_names() -> list[str]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return [name for _, name in sorted(bytes_to_unicode().items())]


def _printable(text: str) -> str:
    return "".join(_byte_names()[byte] for byte in text.encode())


@functools.cache
def _vocabulary() -> Vocabulary:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["\n".join(lines) for lines in _paragraphs()], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    normal = [*tokens, *map(_printable, WHOLE_WORDS)]
    kinds = [3] * len(CONTROL) + [1] * len(normal) + [4] * len(USER_DEFINED)
    return Vocabulary([*CONTROL, *normal, *USER_DEFINED], kinds, [" ".join(pair) for pair in model["merges"]])


def _paragraphs() -> Iterable[list[str]]:
    lines = training_lines()
    return (lines[at : at + 5] for at in range(0, len(lines), 5))


class Reference:
    """Byte-level BPE by the book."""

    def __init__(self, vocabulary: Vocabulary, published: Published) -> None:
        self.published = published
        self.ids = {token: i for i, token in enumerate(vocabulary.tokens)}
        self.ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(vocabulary.merges)}
        added = sorted((*CONTROL, *USER_DEFINED), key=len, reverse=True)
        self.added = regex.compile("|".join(f"({regex.escape(token)})" for token in added))
        self.expressions = [regex.compile(f"({expression})") for expression in published.expressions]

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in filter(None, self.added.split(text)):
            ids += [self.ids[part]] if self.added.fullmatch(part) else self._words(part)
        return ids

    def _words(self, text: str) -> list[int]:
        words = [unicodedata.normalize("NFC", text) if self.published.nfc else text]
        for expression in self.expressions:
            words = [part for word in words for part in self._isolate(expression, word)]
        return [token for word in words for token in self._merge(_printable(word))]

    def _isolate(self, expression: regex.Pattern[str], word: str) -> Iterable[str]:
        at = 0
        for match in expression.finditer(word):
            yield from filter(None, (word[at : match.start()], match.group()))
            at = match.end()
        yield from filter(None, (word[at:],))

    def _merge(self, word: str) -> list[int]:
        if self.published.whole_words and word in self.ids:
            return [self.ids[word]]
        pieces = list(word)
        while len(pieces) > 1:
            ranks = [self.ranks.get(pair, len(self.ranks)) for pair in pairwise(pieces)]
            if (best := min(ranks)) == len(self.ranks):
                break
            at = ranks.index(best)
            pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
        return [self.ids[piece] for piece in pieces]


def _import(pre: str, folder: Path) -> Path:
    tokens, kinds, merges = _vocabulary()
    keys = {"pre": pre, "token_type": kinds, "merges": merges, "add_bos_token": False}
    path = tiny.write_gguf_vocabulary(folder / "model.gguf", "gpt2", tokens, **keys)
    (folder / "tokenizer").mkdir()
    for name, content in _core.gguf_files(path):
        (folder / "tokenizer" / name).write_bytes(content)
    return folder / "tokenizer"


TEXTS = hard_texts((*CONTROL, *USER_DEFINED, *WHOLE_WORDS))


@pytest.mark.parametrize("pre", PUBLISHED)
def test_ids_are_those_of_the_published_pre_tokenizer(pre: str, tmp_path: Path) -> None:
    ours = Tokenizer.from_file(str(_import(pre, tmp_path) / "tokenizer.json"))
    reference = Reference(_vocabulary(), PUBLISHED[pre])
    different = [
        (text, ours.encode(text).tokens, [ours.id_to_token(token) for token in reference.encode(text)])
        for text in TEXTS
        if ours.encode(text).ids != reference.encode(text)
    ]
    assert different == []
    # of an added token with other letters than ASCII, `tokenizers` takes the letters for bytes when it decodes
    plain = [text for text in TEXTS if "naïve" not in text and not PUBLISHED[pre].nfc]
    assert [text for text in plain if ours.decode(ours.encode(text).ids, skip_special_tokens=False) != text] == []


@pytest.mark.parametrize(("pre", "name"), [("gpt-2", "GPT2Tokenizer"), ("qwen2", "Qwen2Tokenizer")])
def test_ids_are_those_of_the_class_of_transformers(pre: str, name: str, tmp_path: Path) -> None:
    import transformers

    tokens, kinds, merges = _vocabulary()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    theirs = getattr(transformers, name)(
        vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges], unk_token=CONTROL[0]
    )
    theirs.add_special_tokens({"additional_special_tokens": list(CONTROL)})
    user_defined = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 4]
    theirs.add_tokens([transformers.AddedToken(token, normalized=False) for token in user_defined])
    ours = transformers.AutoTokenizer.from_pretrained(_import(pre, tmp_path))
    assert len(theirs) == len(tokens)
    texts = [text for text in TEXTS if ours(text).input_ids != theirs(text, add_special_tokens=False).input_ids]
    assert texts == []
