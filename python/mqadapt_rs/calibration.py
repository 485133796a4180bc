"""Calibration text for the merge methods that need it: windows of tokens, drawn from a file or a data set of the hub."""

from __future__ import annotations

import random
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from mqadapt_rs._core import Calibration
from mqadapt_rs.errors import ArgumentError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from mqadapt_rs.hub import Source

ENOUGH_TOKENS = 8192
"""Below this many, the merge visibly follows its own calibration text (see docs/merge-methods.md)."""

_CHARACTERS_PER_TOKEN = 5
_CHOICE = 8
"""Of a data set, this many times the tokens are read, for the seed to choose from."""
_CHOICE_OF_FILE = 256
"""The same of a file, which is here already."""
_WHOLE = 16 << 20
"""A file of no more characters is read whole in any case."""


def load_calibration(
    src: Source,
    text: str | os.PathLike[str] | None,
    *,
    field: str = "text",
    tokens: int = 16384,
    context: int = 2048,
    seed: int = 0,
    target_context: Sequence[int] = (512, 2048),
    stats: str | os.PathLike[str] | None = None,
    sequential: bool = False,
    refine: int = 0,
) -> Calibration:
    """Calibration from a text file, a `.jsonl`, a `.jsonl.gz` or a data set of the hub, tokenised as the model does.

    The documents are concatenated and cut into windows of `context` tokens, of which as many as make `tokens` are
    drawn with `seed`; a text with no more than that is taken whole. Of a file no more than some hundred times `tokens`
    are read, of a data set (`org/name[@revision][:folder or file]`) no more than some times. Without a text, `stats`
    names saved statistics.

    Raises:
        ArgumentError: the text is shorter than one window, or there is neither text nor statistics.
        OSError, MqadaptError: the text or the tokenizer cannot be read.
    """
    calibration = partial(
        Calibration, target_context=list(target_context), stats=stats, sequential=sequential, refine=refine
    )
    if text is None:
        if stats is None:
            raise ArgumentError("calibration needs a text, or a file of saved statistics (--stats)")
        return calibration()
    from mqadapt_rs import text as texts

    words = "".join(documents(text, field, tokens))
    ids = texts.token_ids(texts.load_tokenizer(src), words)
    windows = draw_windows(ids, tokens=tokens, context=context, seed=seed)
    found = sum(map(len, windows))
    if found < ENOUGH_TOKENS:
        warnings.warn(
            f"{found} tokens of calibration text are few: the merge fits them more than the language; "
            f"{ENOUGH_TOKENS} or more would do",
            stacklevel=2,
        )
    return calibration(windows)


def documents(text: str | os.PathLike[str], field: str, tokens: int) -> Iterator[str]:
    """The documents of a file, or of a data set of the hub no more than some times `tokens` needs.

    Raises:
        OSError, MqadaptError: they cannot be read.
    """
    from mqadapt_rs import dataset
    from mqadapt_rs import text as texts

    named = dataset.parse(text) if isinstance(text, str) and not Path(text).exists() else None
    if named is None:
        yield from texts.read_documents(text, field, max(_WHOLE, _CHARACTERS_PER_TOKEN * _CHOICE_OF_FILE * tokens))
        return
    characters = 0
    for document in dataset.documents(named, field):
        # rows of a data set often come without the line that separates them
        yield document if document.endswith("\n") else document + "\n"
        characters += len(document)
        if characters > _CHARACTERS_PER_TOKEN * _CHOICE * tokens:
            return


def draw_windows(ids: Sequence[int], *, tokens: int, context: int, seed: int) -> list[list[int]]:
    """Non-overlapping windows of `context` ids, `tokens` in all, in the order of the text.

    Raises:
        ArgumentError: the text is shorter than one window.
    """
    available, wanted = len(ids) // context, max(1, tokens // context)
    if available == 0:
        raise ArgumentError(f"the calibration text has {len(ids)} tokens, less than one window of {context}")
    chosen = sorted(random.Random(seed).sample(range(available), min(wanted, available)))
    return [list(ids[at * context : (at + 1) * context]) for at in chosen]
