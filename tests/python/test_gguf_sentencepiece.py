"""GGUF tokenizers of the SentencePiece kind: ids are those of the `sentencepiece` package and of llama.cpp's rule.

In: small models that `sentencepiece` trains here, written into GGUF files. Out: the ids that the rebuilt `tokenizer.json` gives.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import tiny
from hard_text import hard_texts, training_lines
from llama_cpp_rule import LlamaCpp
from mqadapt_rs import _core

gguf = pytest.importorskip("gguf", reason="the package gguf (extra `test`) is not installed")
spm = pytest.importorskip("sentencepiece", reason="the package sentencepiece (extra `test`) is not installed")

CONTROL = ("<start_of_turn>", "<end_of_turn>")
# as in Gemma: runs of white space and markup; `▁` is SentencePiece's space
USER_DEFINED = ("\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁", "▁▁▁▁", "\t", "\t\t", "<b>", "</b>", "<table>", "été")


@functools.cache
def _trained(prefix: bool, user_defined: bool, byte_fallback: bool = True) -> spm.SentencePieceProcessor:
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=(line for line in training_lines() if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=1500,
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=prefix,
        control_symbols=list(CONTROL),
        user_defined_symbols=list(USER_DEFINED) if user_defined else [],
        minloglevel=2,
    )
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


def _kind(model: spm.SentencePieceProcessor, token: int, user_defined: Sequence[str]) -> int:
    """`llama_token_type`, as llama.cpp's converter finds it."""
    if model.is_unknown(token):
        return 2
    if model.is_control(token):
        return 3
    if model.is_byte(token):
        return 6
    return 4 if model.id_to_piece(token) in user_defined else 1


def _write(
    path: Path, model: spm.SentencePieceProcessor, prefix: bool, user_defined: Sequence[str], spaces: bool = False
) -> Path:
    """`spaces`: the texts of user-defined tokens with spaces in place of `▁`, as the converter writes added tokens."""
    kinds = [_kind(model, token, user_defined) for token in range(len(model))]
    texts = [model.id_to_piece(token) for token in range(len(model))]
    if spaces:
        texts = [text.replace("▁", " ") if kind == 4 else text for text, kind in zip(texts, kinds, strict=True)]
    scores = [model.get_score(token) for token in range(len(model))]
    return tiny.write_gguf(path, texts, scores, kinds, add_space_prefix=prefix, add_bos_token=False)


def _import(path: Path, folder: Path) -> Tokenizer:
    folder.mkdir()
    for name, content in _core.gguf_files(path):
        (folder / name).write_bytes(content)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _between(text: str, tokens: Sequence[str]) -> Iterable[str]:
    """Control tokens of a text, and what is between them: `sentencepiece` itself does not look for them."""
    return [part for part in re.split("|".join(f"({re.escape(token)})" for token in tokens), text) if part]


def _reference(model: spm.SentencePieceProcessor, text: str) -> list[int]:
    control = {"<unk>": 0, "<s>": 1, "</s>": 2, **{token: model.piece_to_id(token) for token in CONTROL}}
    ids: list[int] = []
    for part in _between(text, tuple(control)):
        ids += [control[part]] if part in control else model.encode(part)
    return ids


def _differences(texts: Sequence[str], ours: Tokenizer, theirs: dict[str, list[int]]) -> list[str]:
    """Texts whose ids differ, with the tokens at the first place where they do."""
    out = []
    for text in texts:
        found, expected = ours.encode(text).ids, theirs[text]
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), 0)
            names = [[ours.id_to_token(token) for token in ids[at : at + 5]] for ids in (found, expected)]
            out.append(f"{text!r}: {names[0]}, expected {names[1]}")
    return out


@pytest.mark.parametrize(
    ("prefix", "user_defined", "spaces", "byte_fallback"),
    [
        pytest.param(True, False, False, True, id="prefix"),
        pytest.param(False, False, False, True, id="no-prefix"),
        pytest.param(False, True, False, True, id="user-defined"),
        pytest.param(False, True, True, True, id="user-defined-spaces"),
        pytest.param(False, False, False, False, id="no-byte-fallback"),
    ],
)
def test_ids_are_those_of_sentencepiece(
    prefix: bool, user_defined: bool, spaces: bool, byte_fallback: bool, tmp_path: Path
) -> None:
    model, own = _trained(prefix, user_defined, byte_fallback), USER_DEFINED if user_defined else ()
    ours = _import(_write(tmp_path / "model.gguf", model, prefix, own, spaces), tmp_path / "tokenizer")
    texts = hard_texts((*CONTROL, *own))
    assert _differences(texts, ours, {text: _reference(model, text) for text in texts}) == []
    # `sentencepiece` writes an unknown character as ` ⁇ `
    plain = [text for text in texts if byte_fallback and not any(token in text for token in ("<unk>", *CONTROL))]
    decoded = {text: model.decode(model.encode(text)) for text in plain}
    assert [text for text in plain if ours.decode(ours.encode(text).ids) != decoded[text]] == []


def test_a_prefix_follows_every_special_token_as_in_llama_cpp(tmp_path: Path) -> None:
    model = _trained(True, True)
    path = _write(tmp_path / "model.gguf", model, True, USER_DEFINED)
    ours = _import(path, tmp_path / "tokenizer")
    llama_cpp = LlamaCpp(path)
    texts = hard_texts((*CONTROL, *USER_DEFINED))
    assert _differences(texts, ours, {text: llama_cpp.encode(text) for text in texts}) == []
