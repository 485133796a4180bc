"""What plans are evaluated on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Data:
    """The evaluation data: windows of a text, or an lm-eval task."""

    text: str | None = None
    field: str = "text"
    context: int = 512
    windows: int | None = None
    include_path: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
