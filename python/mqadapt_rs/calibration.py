"""Calibration text for the merge methods that need it: windows of tokens, drawn from a file or a data set of the hub.

Windows of several lengths, so that one calibration serves short and long contexts: what a head does at the start of its
context is another thing than far from it, and a merge follows what it was shown.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from mqadapt_rs._core import Calibration
from mqadapt_rs.arguments import LARGEST_SEED, whole
from mqadapt_rs.errors import ArgumentError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from mqadapt_rs.sources.hub import Source

TOKENS = 16384
"""Drawn by default."""
CONTEXT = (512, 2048)
"""Tokens of the windows that are drawn by default: half of the tokens in windows of each length."""
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
    tokens: int = TOKENS,
    context: int | Sequence[int] = CONTEXT,
    seed: int = 0,
    target_context: Sequence[int] | None = None,
    stats: str | os.PathLike[str] | None = None,
    sequential: bool = False,
    refine: int = 0,
) -> Calibration:
    """Calibration from a text file, a `.jsonl`, a `.jsonl.gz` or a data set of the hub, tokenised as the model does.

    The documents are concatenated, so that a window may begin or end within one, and windows of `context` tokens are
    drawn from all over them, as many as make `tokens`; a text with no more than that is taken whole. Of several lengths
    each gets an equal part of the tokens; a length that the text is too short for is left out with a warning. Of a
    file no more than some hundred times `tokens` are read, of a data set (`org/name[@revision][:folder or file]`) no more
    than some times. Without a text, `stats` names saved statistics.

    Args:
        src: the model, whose tokenizer is used.
        text: a file or a data set.
        field: the field of a record that holds the text.
        tokens: drawn in all; at least one window of each length.
        context: tokens of a drawn window, one length or several.
        seed: chooses the windows.
        target_context: contexts that the result is for; 512 and 2048 where the windows are that long, else the longest.
        stats: a file of statistics, used where it exists, written where not.
        sequential: refit of `closed-form`.
        refine: its gradient steps.

    Raises:
        ArgumentError: the text is shorter than every window, a target context is longer than every window, or there is
            neither text nor statistics.
        OSError, MqadaptError: the text or the tokenizer cannot be read.
    """
    tokens, seed = whole("tokens", tokens, 1), whole("seed", seed, 0, LARGEST_SEED)
    contexts = None if target_context is None else list(target_context)
    calibration = partial(Calibration, target_context=contexts, stats=stats, sequential=sequential, refine=refine)
    if text is None:
        if stats is None:
            raise ArgumentError("calibration needs a text, or a file of saved statistics (--stats)")
        return calibration()
    from mqadapt_rs import text as texts

    words = "".join(documents(text, field, tokens))
    ids = texts.token_ids(texts.load_tokenizer(src), words)
    windows = draw_windows(ids, tokens=tokens, context=context, seed=seed)
    drawn = {len(window) for window in windows}
    left_out = [length for length in lengths_of(context) if length not in drawn]
    if left_out:
        warnings.warn(
            f"the calibration text has {len(ids)} tokens, too few for windows of {_listed(left_out)}; windows of "
            f"{_listed(sorted(drawn))} are drawn alone",
            stacklevel=2,
        )
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
    from mqadapt_rs import text as texts
    from mqadapt_rs.sources import dataset

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


def lengths_of(context: int | Sequence[int]) -> list[int]:
    """The lengths of windows, ascending, each once.

    Raises:
        ArgumentError: there is none, or one that is less than 1.
    """
    given = context if isinstance(context, Iterable) else [context]
    lengths = sorted({whole("calibration_context", length, 1) for length in given})
    if not lengths:
        raise ArgumentError("calibration_context must be one length in tokens or several; found none")
    return lengths


def draw_windows(ids: Sequence[int], *, tokens: int, context: int | Sequence[int], seed: int) -> list[list[int]]:
    """Windows of ids that do not overlap, `tokens` in all, in the order of the text.

    Of several lengths in `context` each gets an equal part of the tokens and at least one window. The longest are drawn
    first; those of a length are spread evenly over what is left of the text, one from each of as many stretches. A length
    that no room is left for has none.

    Raises:
        ArgumentError: the text is shorter than every window.
    """
    lengths = lengths_of(context)
    if len(ids) < lengths[0]:
        raise ArgumentError(
            f"the calibration text has {len(ids)} tokens, less than one window of {lengths[0]}: choose shorter windows "
            "(--calibration-context) or a longer text"
        )
    fitting = [length for length in lengths if length <= len(ids)]
    chance = random.Random(seed)
    free, drawn, wanted = [(0, len(ids))], [], min(tokens, len(ids))
    for left in range(len(fitting), 0, -1):
        length = fitting[left - 1]
        places = [start + nth * length for start, end in free for nth in range((end - start) // length)]
        count = min(max(1, wanted // left // length), len(places))
        if len(fitting) == 1:
            # as it always was, so that statistics saved of these windows remain those of them
            chosen = sorted(chance.sample(places, count))
        else:
            edges = [nth * len(places) // count for nth in range(count + 1)] if count else []
            chosen = [places[chance.randrange(*stretch)] for stretch in pairwise(edges)]
        drawn += [(start, start + length) for start in chosen]
        free = _gaps(sorted(drawn), len(ids))
        wanted = max(0, wanted - count * length)
    return [list(ids[start:end]) for start, end in sorted(drawn)]


def _gaps(windows: list[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    """What is left of a text of `end` ids between windows in its order."""
    edges = [0, *(edge for window in windows for edge in window), end]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _listed(lengths: Sequence[int]) -> str:
    return " and ".join(map(str, lengths)) + " tokens"
