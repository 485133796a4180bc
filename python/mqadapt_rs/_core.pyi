"""Types of the extension module. The public names are those of `mqadapt_rs`."""

import os
from collections.abc import Sequence
from typing import Final, TypeAlias, final

_Path: TypeAlias = str | os.PathLike[str]

__all__ = ["ModelConfig", "Plan", "__version__"]
__version__: Final[str]

@final
class ModelConfig:
    """What a model is: the validated content of its `config.json`."""

    @classmethod
    def load(cls, src: _Path) -> ModelConfig:
        """The configuration of a model: a folder, a `.gguf` file or a hub id (only `config.json` is fetched).

        Raises:
            MqadaptError: the file is not a configuration that this package understands.
            OSError: the file cannot be read.
        """
    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Reads the text of a `config.json`.

        Raises:
            MqadaptError: with the first field that cannot be.
        """
    @property
    def model_type(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> list[int]:
        """K/V heads of each layer."""
    @property
    def head_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def dtype(self) -> str | None:
        """`float32`, `float16` or `bfloat16`, where `config.json` says it."""
    @property
    def parameters(self) -> int:
        """Parameters of the model, tied embeddings counted once."""

@final
class Plan:
    """How many K/V heads each layer of a model gets. Equal and hashable by content."""

    @classmethod
    def parse(cls, text: Plan | _Path | Sequence[int], config: ModelConfig | _Path) -> Plan:
        """Reads a plan for a model.

        Args:
            text: `keep`; a flag for each layer, `1, 0, 0, ...`; `mqa:LAYERS` and `gqaN:LAYERS` joined by `;`; the name
                of a `.json` or `.yaml` file; or a list with the K/V heads of each layer.
            config: the configuration, or anything that names a model.

        Raises:
            ArgumentError: the plan is not legal for this model; the message lists what is.
        """
    @property
    def num_key_value_heads(self) -> list[int]:
        """K/V heads of each layer."""
    @property
    def source_num_key_value_heads(self) -> list[int]:
        """K/V heads of each layer of the model that the plan was built for."""
    @property
    def changed_layers(self) -> list[int]:
        """The layers that the plan changes, ascending."""
    def kv_bytes_per_token(self, config: ModelConfig | _Path, value_bytes: int = 2) -> int:
        """Bytes that one token adds to the K/V cache over all layers, with `value_bytes` bytes a value."""
    def parameters(self, config: ModelConfig | _Path) -> int:
        """Parameters of the model under the plan."""
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self, /) -> int: ...
