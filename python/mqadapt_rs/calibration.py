"""Calibration text for the merge methods that need it: windows of tokens, drawn from a file."""

from __future__ import annotations

import random
import warnings
from typing import TYPE_CHECKING

from mqadapt_rs._core import Calibration
from mqadapt_rs.errors import ArgumentError

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from mqadapt_rs.hub import Source

ENOUGH_TOKENS = 8192
"""Below this many, the merge visibly follows its own calibration text (see docs/merge-methods.md)."""


def load_calibration(
    src: Source,
    file: str | os.PathLike[str] | None,
    *,
    field: str = "text",
    tokens: int = 16384,
    context: int = 2048,
    seed: int = 0,
    target_context: Sequence[int] = (512, 2048),
    stats: str | os.PathLike[str] | None = None,
    sequential: bool = False,
) -> Calibration:
    """Calibration from a text file, a `.jsonl` or a `.jsonl.gz`, tokenised as the model does.

    The documents are concatenated and cut into windows of `context` tokens, of which as many as make `tokens` are
    drawn with `seed`; a text with no more than that is taken whole. Without a file, `stats` names saved statistics.

    Raises:
        ArgumentError: the text is shorter than one window, or there is neither text nor statistics.
        OSError, MqadaptError: the file or the tokenizer cannot be read.
    """
    if file is None:
        if stats is None:
            raise ArgumentError("calibration needs a text file, or a file of saved statistics (--stats)")
        return Calibration(target_context=list(target_context), stats=stats, sequential=sequential)
    from mqadapt_rs import text

    ids = text.token_ids(text.load_tokenizer(src), "".join(text.read_documents(file, field)))
    windows = draw_windows(ids, tokens=tokens, context=context, seed=seed)
    found = sum(map(len, windows))
    if found < ENOUGH_TOKENS:
        warnings.warn(
            f"{found} tokens of calibration text are few: the merge fits them more than the language; "
            f"{ENOUGH_TOKENS} or more would do",
            stacklevel=2,
        )
    return Calibration(windows, target_context=list(target_context), stats=stats, sequential=sequential)


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
