"""The tokenizer for lm-eval: that of transformers, so that token ids equal those of the `hf` backend.

In: a folder, a `.gguf` file or a hub id. Out: a tokenizer with its chat template. `text.py` loads the plain tokenizer.
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

# classes whose behaviour is that of `tokenizer.json`
_PLAIN = {"PreTrainedTokenizerFast", "TokenizersBackend"}
# files that transformers may read to load a tokenizer
_FILES = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "tokenizer*", "*.py"]


def load_tokenizer(src: Source, trust_remote_code: bool = False, add_bos_token: bool | None = None) -> Any:
    """Load the tokenizer that `AutoTokenizer` of transformers loads.

    Raises:
        MqadaptError: the model has no tokenizer that transformers can read.
        OSError: as `hub.fetch_tokenizer`.
    """
    folder = hub.fetch_tokenizer(src)
    options: dict[str, Any] = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    files.refuse_special(folder, _FILES)
    kind = _read(folder / "tokenizer_config.json").get("tokenizer_class")
    plain = isinstance(kind, str) and kind in _PLAIN and not trust_remote_code and (folder / "tokenizer.json").exists()
    try:
        if plain:
            # the same tokenizer without `AutoTokenizer`, which imports PyTorch if it is installed
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast.from_pretrained(str(folder), **options)
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code, **options)
    except Exception as error:  # the error of transformers depends on the tokenizer class
        raise MqadaptError(f"{folder}: transformers cannot load a tokenizer from here: {error}") from error


def encode(tokenizer: Any, strings: Sequence[str], add_special_tokens: Sequence[bool | None]) -> list[list[int]]:
    """Encode many texts; `None` adds the default special tokens."""
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
