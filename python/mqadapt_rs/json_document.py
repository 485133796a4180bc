"""JSON that a stranger may have written. In: its text. Out: its content, or a `ValueError` whatever is wrong with it."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """As `json.loads`.

    Raises:
        ValueError: the text is not JSON, not UTF-8, or nested deeper than Python's stack.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
