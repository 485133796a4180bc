"""A model's tokenizer as transformers has it, for lm-eval: its ids must be those of lm-eval's `hf` backend.

In: a folder, a `.gguf` file or a hub id. Out: transformers' tokenizer, with its chat template. `text.py` has the plain one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mqadapt_rs import files
from mqadapt_rs.errors import MqadaptError
from mqadapt_rs.sources import hub

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mqadapt_rs.sources.hub import Source

# classes that add nothing to `tokenizer.json`
_PLAIN = {"PreTrainedTokenizerFast", "TokenizersBackend"}
# what transformers may read of a folder to make a tokenizer
_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "tokenizer*", "*.py"]


def load_tokenizer(src: Source, trust_remote_code: bool = False, add_bos_token: bool | None = None) -> Any:
    """The tokenizer that transformers' `AutoTokenizer` gives.

    Raises:
        MqadaptError: the model has no tokenizer, or not one that transformers can read.
        OSError: as `hub.fetch_tokenizer`.
    """
    folder = hub.fetch_tokenizer(src)
    options: dict[str, Any] = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    files.refuse_special(folder, _FILES)
    kind = _read(folder / "tokenizer_config.json").get("tokenizer_class")
    plain = isinstance(kind, str) and kind in _PLAIN and not trust_remote_code and (folder / "tokenizer.json").exists()
    try:
        if plain:
            # the same tokenizer without `AutoTokenizer`, which imports PyTorch wherever it is installed
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(folder), **options)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # what transformers raises for a folder without a usable tokenizer depends on the class
        raise MqadaptError(f"{folder}: transformers cannot load a tokenizer from here: {error}") from error


def encode(tokenizer: Any, strings: Sequence[str], add_special_tokens: Sequence[bool | None]) -> list[list[int]]:
    """Token ids of many texts; `None`: special tokens as the tokenizer adds them by default."""
    out: list[list[int]] = [[] for _ in strings]
    for special in (None, False, True):
        chosen = [i for i, wanted in enumerate(add_special_tokens) if wanted is special]
        options = {} if special is None else {"add_special_tokens": special}
        if chosen:
            encoded = tokenizer([strings[i] for i in chosen], return_attention_mask=False, **options)
            for i, ids in zip(chosen, encoded["input_ids"], strict=True):
                out[i] = ids
    return out


def _read(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    content = files.read_json(file)
    return content if isinstance(content, dict) else {}
