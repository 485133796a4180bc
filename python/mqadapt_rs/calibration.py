"""Calibration of merge methods: its options, and windows of tokens drawn from a file or a data set of the hub.

In: options, a model and its text. Out: a `Calibration`. Windows have several lengths, so that one calibration serves short and
long contexts: a head attends differently at the start of its context, and a merge fits the contexts that it was shown.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, fields
from dataclasses import field as dataclass_field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mqadapt_rs._core import Calibration, methods
from mqadapt_rs.arguments import LARGEST_SEED, whole
from mqadapt_rs.errors import ArgumentError

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from mqadapt_rs.sources.hub import Source

TOKENS = 24576
"""Default number of drawn tokens."""
CONTEXT = (512, 2048)
"""Default window lengths in tokens; each length gets half of the tokens."""
ENOUGH_TOKENS = 8192
"""With fewer tokens, a merge visibly overfits its calibration text (see docs/merge-methods.md)."""

_CHARACTERS_PER_TOKEN = 5
_CHOICE = 8
"""A data set is read up to this multiple of the drawn tokens, from which the seed chooses."""
_CHOICE_OF_FILE = 256
"""The same multiple for a file, which needs no download."""
_WHOLE = 16 << 20
"""A file of at most this many characters is always read completely."""


def _methods(option: str | None = None) -> str:
    """The names of the methods that need a calibration, or that use one of its options."""
    return " and ".join(m.name for m in methods() if (option in m.options if option else m.needs_calibration))


def _option(name: str, default: Any, text: str, kind: type, least: int | None = None) -> Any:
    """A field of `CalibrationOptions`.

    Args:
        name: of the option: keyword argument of `search`, and with dashes the option of commands.
        default: its default.
        text: the help text.
        kind: the type of its value; `tuple` stands for lengths, separated by commas on a command line.
        least: its smallest value.
    """
    bounds = {} if least is None else {"least": least}
    return dataclass_field(default=default, metadata={"name": name, "help": text, "type": kind, **bounds})


@dataclass(frozen=True)
class CalibrationOptions:
    """The options of a calibration.

    The options of the commands and the commands in reports are derived from this type; `load_calibration` and `search` take
    the same ones.
    """

    text: str | None = _option(
        "calibration",
        None,
        f"Calibration text for {_methods()}: a plain text file, .jsonl\\[.gz], or a data set of the hub, "
        "org/name\\[@revision]\\[:folder or file].",
        str,
    )
    field: str = _option("calibration_field", "text", "Name of the text field in a record.", str)
    tokens: int = _option("calibration_tokens", TOKENS, "Number of tokens drawn from the text.", int, 1)
    context: tuple[int, ...] = _option(
        "calibration_context",
        CONTEXT,
        "Window lengths in tokens, separated by commas; each length gets an equal part of the tokens.",
        tuple,
        2,
    )
    target_context: tuple[int, ...] | None = _option(
        "target_context",
        None,
        "Context lengths in tokens that the result is optimised for, separated by commas; by default those of 512,2048 that "
        "the windows reach.",
        tuple,
        1,
    )
    stats: str | None = _option(
        "stats", None, "Statistics file: read if it exists, written if not, so that text is processed once.", Path
    )
    sequential: bool = _option(
        "sequential", False, f"{_methods('sequential')}: refit o_proj layer by layer on the converted model.", bool
    )
    refine: int = _option(
        "refine",
        0,
        f"{_methods('refine')}: number of gradient steps on every merged layer before the refit; 96 is a good number.",
        int,
        0,
    )

    @classmethod
    def from_keywords(cls, keywords: dict[str, Any]) -> CalibrationOptions:
        """The options from keyword arguments of their names."""
        given = {one.name: keywords[one.metadata["name"]] for one in fields(cls) if one.metadata["name"] in keywords}
        for name in ("text", "stats"):
            given[name] = None if given.get(name) is None else str(given[name])
        return cls(**given)

    def keywords(self) -> dict[str, Any]:
        """The options as keyword arguments of their names."""
        return {one.metadata["name"]: getattr(self, one.name) for one in fields(self)}

    @property
    def refits(self) -> bool:
        """Whether the result for a layer depends on the layers before it."""
        return self.sequential or self.refine > 0

    def load(self, src: Source, seed: int) -> Calibration | None:
        """The calibration of a model; `None` if the options name neither a text nor statistics.

        Raises:
            ArgumentError: `sequential` or `refine` without a text or statistics.
            OSError, MqadaptError: as `load_calibration`.
        """
        if self.text is None and self.stats is None:
            if self.refits:
                raise ArgumentError(
                    f"--sequential and --refine need --method {_methods('sequential')} and a --calibration"
                )
            return None
        return load_calibration(
            src,
            self.text,
            field=self.field,
            tokens=self.tokens,
            context=self.context,
            seed=seed,
            target_context=self.target_context,
            stats=self.stats,
            sequential=self.sequential,
            refine=self.refine,
        )

    def command_line(self) -> dict[str, Any]:
        """The options of a command line that differ from the defaults, by their names there."""
        found = {}
        for one in fields(self):
            value = getattr(self, one.name)
            if value != one.default and not (one.name == "field" and self.text is None):
                words = ",".join(map(str, value)) if isinstance(value, tuple) else value
                found[one.metadata["name"].replace("_", "-")] = words
        return found


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
    """Load a calibration from a text file, a `.jsonl`, a `.jsonl.gz` or a data set of the hub, with the model's tokenizer.

    The documents are concatenated, so that a window may begin or end within a document. Windows of `context` tokens are drawn
    from the whole text until they hold `tokens` tokens; a shorter text is used completely. Each of several lengths gets an
    equal part of the tokens; a length that exceeds the text is left out with a warning. At most some hundred times `tokens`
    are read from a file, and some times `tokens` from a data set (`org/name[@revision][:folder or file]`). Without a text,
    `stats` names saved statistics.

    Args:
        src: the model; its tokenizer is used.
        text: a file or a data set.
        field: name of the text field in a record.
        tokens: number of drawn tokens; at least one window of each length is drawn.
        context: window lengths in tokens, one or several.
        seed: chooses the windows.
        target_context: context lengths that the result is optimised for; by default those of 512 and 2048 that the windows reach,
            else the longest window.
        stats: statistics file; it is read if it exists and written if not.
        sequential: refit layer by layer on the converted model, for the methods that have this option.
        refine: number of gradient steps before the refit.

    Raises:
        ArgumentError: the text is shorter than every window, a target context exceeds every window, or there is neither a text
            nor statistics.
        OSError, MqadaptError: the text or the tokenizer cannot be read.
    """
    tokens, seed = whole("tokens", tokens, 1), whole("seed", seed, 0, LARGEST_SEED)
    contexts = None if target_context is None else list(target_context)
    calibration = partial(Calibration, target_context=contexts, stats=stats, sequential=sequential, refine=refine)
    if text is None:
        if stats is None:
            raise ArgumentError("calibration needs a text, or a file of saved statistics (--stats)")
        return calibration()
    return calibration(load_windows(src, text, field=field, tokens=tokens, context=context, seed=seed))


def load_windows(
    src: Source,
    text: str | os.PathLike[str],
    *,
    field: str,
    tokens: int,
    context: int | Sequence[int],
    seed: int,
) -> list[list[int]]:
    """Draw the windows of a calibration, as `load_calibration` describes them.

    Raises:
        ArgumentError: the text is shorter than every window.
        OSError, MqadaptError: the text or the tokenizer cannot be read.
    """
    from mqadapt_rs import text as texts

    words = "".join(documents(text, field, tokens))
    ids = texts.token_ids(texts.load_tokenizer(src), words)
    windows = draw_windows(ids, tokens=tokens, context=context, seed=seed)
    drawn = {len(window) for window in windows}
    left_out = [length for length in lengths_of(context) if length not in drawn]
    if left_out:
        warnings.warn(
            f"the calibration text has {len(ids)} tokens, too few for windows of {_listed(left_out)}; only windows "
            f"of {_listed(sorted(drawn))} are drawn",
            stacklevel=3,
        )
    found = sum(map(len, windows))
    if found < ENOUGH_TOKENS:
        warnings.warn(
            f"{found} tokens of calibration text are few: the merge overfits them; use {ENOUGH_TOKENS} or more",
            stacklevel=3,
        )
    return windows


def documents(text: str | os.PathLike[str], field: str, tokens: int) -> Iterator[str]:
    """Yield the documents of a file or of a data set of the hub, up to a multiple of `tokens`.

    Raises:
        OSError, MqadaptError: the text cannot be read.
    """
    from mqadapt_rs import text as texts
    from mqadapt_rs.sources import dataset

    named = dataset.parse(text) if isinstance(text, str) and not Path(text).exists() else None
    if named is None:
        yield from texts.read_documents(text, field, max(_WHOLE, _CHARACTERS_PER_TOKEN * _CHOICE_OF_FILE * tokens))
        return
    characters = 0
    for document in dataset.documents(named, field):
        # rows of a data set often lack the line break that separates them
        yield document if document.endswith("\n") else document + "\n"
        characters += len(document)
        if characters > _CHARACTERS_PER_TOKEN * _CHOICE * tokens:
            return


def lengths_of(context: int | Sequence[int]) -> list[int]:
    """Return the window lengths in ascending order without repetition.

    Raises:
        ArgumentError: there is no length, or one is less than 1.
    """
    given = context if isinstance(context, Iterable) else [context]
    lengths = sorted({whole("calibration_context", length, 1) for length in given})
    if not lengths:
        raise ArgumentError("calibration_context must be one length in tokens or several; found none")
    return lengths


def draw_windows(ids: Sequence[int], *, tokens: int, context: int | Sequence[int], seed: int) -> list[list[int]]:
    """Draw windows that do not overlap, with `tokens` ids in total, in the order of the text.

    Each length in `context` gets an equal part of the tokens and at least one window. The longest windows are drawn first. The
    windows of one length are spread evenly over the rest of the text, one in each of equally long stretches. A length for
    which no room is left gets no window.

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
            # this draw must not change: saved statistics belong to its windows
            chosen = sorted(chance.sample(places, count))
        else:
            edges = [nth * len(places) // count for nth in range(count + 1)] if count else []
            chosen = [places[chance.randrange(*stretch)] for stretch in pairwise(edges)]
        drawn += [(start, start + length) for start in chosen]
        free = _gaps(sorted(drawn), len(ids))
        wanted = max(0, wanted - count * length)
    return [list(ids[start:end]) for start, end in sorted(drawn)]


def _gaps(windows: list[tuple[int, int]], end: int) -> list[tuple[int, int]]:
    """The ranges of a text of `end` ids that the windows leave free."""
    edges = [0, *(edge for window in windows for edge in window), end]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _listed(lengths: Sequence[int]) -> str:
    return " and ".join(map(str, lengths)) + " tokens"
