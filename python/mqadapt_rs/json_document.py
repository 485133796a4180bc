"""JSON from untrusted files. In: its text. Out: its content, or a `ValueError` for any defect."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """Parse JSON as `json.loads` does.

    Raises:
        ValueError: the text is not JSON, not UTF-8, or nested deeper than Python's stack.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
