"""llama.cpp's tokenizer of the SentencePiece kind (`llm_tokenizer_spm`, `tokenizer_st_partition`), in Python.

In: the metadata of a GGUF file, a text. Out: ids. Nothing here uses mqadapt-rs.
"""

from __future__ import annotations

import heapq
from pathlib import Path

from gguf_files import GgufFile


class LlamaCpp:
    """The rule of llama.cpp's `llm_tokenizer_spm` and `tokenizer_st_partition`, over the metadata of a file."""

    def __init__(self, path: Path) -> None:
        metadata = GgufFile(path).metadata
        self.texts, self.scores, kinds = (
            metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")
        )
        self.prefix = metadata["tokenizer.ggml.add_space_prefix"]
        self.ids = {text: token for token, text in enumerate(self.texts)}
        special = [text for text, kind in zip(self.texts, kinds, strict=True) if kind in (2, 3, 4)]
        self.special = sorted(special, key=lambda text: len(text.encode()), reverse=True)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        after_special = True
        for part in self._partition(text):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
                continue
            prefix = " " if self.prefix and after_special else ""
            ids += self._merge((prefix + part).replace(" ", "▁"))
            after_special = False
        return ids

    def _partition(self, text: str) -> list[str | int]:
        """Special tokens as ids and what is between them; longer tokens are looked for first."""
        parts: list[str | int] = [text] if text else []
        for token in (token for token in self.special if token in text):
            split: list[str | int] = []
            for part in parts:
                if isinstance(part, int):
                    split.append(part)
                    continue
                for i, between in enumerate(part.split(token)):
                    split += [self.ids[token]] * (i > 0)
                    split += [between] if between else []
            parts = split
        return parts

    def _merge(self, text: str) -> list[int]:
        """Joins the neighbours that make the token of the highest score, the leftmost where several do."""
        pieces: list[str] = list(text)
        after = [*range(1, len(pieces)), -1]
        before = list(range(-1, len(pieces) - 1))
        queue: list[tuple[float, int, int, str]] = []

        def look(left: int, right: int) -> None:
            if min(left, right) >= 0 and (token := self.ids.get(pieces[left] + pieces[right])) is not None:
                heapq.heappush(queue, (-self.scores[token], left, right, pieces[left] + pieces[right]))

        for i in range(1, len(pieces)):
            look(i - 1, i)
        while queue:
            _, left, right, joined = heapq.heappop(queue)
            if not pieces[left] or not pieces[right] or pieces[left] + pieces[right] != joined:
                continue
            pieces[left], pieces[right] = joined, ""
            after[left] = after[right]
            if after[right] >= 0:
                before[after[right]] = left
            look(before[left], left)
            look(left, after[left])
        tokens = ([piece] if piece in self.ids else [f"<0x{byte:02X}>" for byte in piece.encode()] for piece in pieces)
        return [self.ids[token] for group in tokens for token in group]
