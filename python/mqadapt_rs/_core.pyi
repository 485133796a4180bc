"""Types of the extension module. The public names are those of `mqadapt_rs`."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias, TypedDict, final, overload, type_check_only

import numpy as np
from numpy.typing import NDArray

_Path: TypeAlias = str | os.PathLike[str]
_Ids: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]
# called as progress(phase, done, total) about twenty times per second; an exception in it stops the work and is raised
_Progress: TypeAlias = Callable[[str, int, int], object]

__all__ = [
    "Calibration",
    "ConversionReport",
    "Family",
    "HiddenStates",
    "LayerCache",
    "Method",
    "Model",
    "ModelConfig",
    "Plan",
    "RequestStates",
    "Verification",
    "__version__",
    "convert",
    "families",
    "gguf_files",
    "inspect",
    "methods",
    "plan_merge_settings",
    "register_family",
    "registered_families",
    "verify",
]
__version__: Final[str]

@final
class ModelConfig:
    """The configuration of a model: the validated content of its `config.json`."""

    @classmethod
    def load(cls, src: _Path) -> ModelConfig:
        """Load the configuration of a model: a folder, a `.gguf` file or a hub id (only `config.json` is downloaded).

        Raises:
            MqadaptError: the configuration is invalid or not supported.
            OSError: the file cannot be read.
        """
    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """Parse the text of a `config.json`.

        Raises:
            MqadaptError: a field is invalid.
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
        """`float32`, `float16` or `bfloat16`; `None` if `config.json` has no dtype."""
    @property
    def parameters(self) -> int:
        """The number of parameters; tied embeddings are counted once."""
    def layer_caches(self, layer_idx: int) -> list[LayerCache]:
        """What a layer may cache under a plan, ascending by bytes; the last is its own.

        Raises:
            ArgumentError: the model has no such layer.
        """

@final
class LayerCache:
    """What a layer caches of every token: the choice of a plan for one layer. Equal and hashable by content.

    `str()` gives the name that the grammar of plans has for it, such as `gqa2`.
    """

    def __new__(cls, num_key_value_heads: int, storage: str = "computed") -> LayerCache:
        """K/V heads, and how they are stored.

        Args:
            num_key_value_heads: their number.
            storage: `computed` (the dtype that they are computed in), `int8` or `int4`.

        Raises:
            ArgumentError: there is no head, or no such storage.
        """
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def storage(self) -> str:
        """How it is stored: `computed`, `int8` or `int4`."""
    def reductions(self) -> list[LayerCache]:
        """What a layer that caches this may be reduced to, ascending by bytes; the last is this."""
    def bytes_per_token(self, config: ModelConfig | _Path, value_bytes: int = 2) -> int:
        """Bytes that one token adds to the cache of a layer, with `value_bytes` bytes a computed value."""
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self, /) -> int: ...
    def __reduce__(self, /) -> tuple[type[LayerCache], tuple[int, str]]: ...

@final
class Plan:
    """What each layer of a model caches. Equal and hashable by content."""

    @classmethod
    def parse(cls, text: Plan | _Path | Sequence[int], config: ModelConfig | _Path) -> Plan:
        """Parse a plan for a model.

        Args:
            text: `keep`; a flag for each layer, `1, 0, 0, ...`; `mqa:LAYERS`, `gqaN:LAYERS` and `keep:LAYERS` separated by
                `;`, with `@int8` or `@int4` behind the name where the cache is stored so; the name of a `.json` or `.yaml`
                file; or a list with the K/V heads of each layer.
            config: the configuration, or anything that names a model.

        Raises:
            ArgumentError: the plan is not legal for this model; the message lists what is.
        """
    @classmethod
    def from_layers(cls, layers: Sequence[LayerCache], config: ModelConfig | _Path | Sequence[LayerCache]) -> Plan:
        """The plan under which the layers of a model cache this.

        Args:
            layers: one for each layer.
            config: the configuration, anything that names a model, or what its layers cache.

        Raises:
            ArgumentError: the plan is not legal for this model; the message lists what is.
        """
    @property
    def layers(self) -> list[LayerCache]:
        """What each layer caches."""
    def describe(self) -> str:
        """The text of the plan, which `parse` reads back: `keep`, or parts such as `mqa:0,3-7` joined by `; `."""
    @property
    def num_key_value_heads(self) -> list[int]:
        """K/V heads of each layer."""
    @property
    def storage(self) -> list[str]:
        """How the K/V cache of each layer is stored: `computed`, `int8` or `int4`."""
    def stored(self, storage: str) -> Plan:
        """The same plan with the K/V cache of all layers stored so.

        Raises:
            ArgumentError: the plan says otherwise of a layer, or there is no such storage.
        """
    @property
    def source_num_key_value_heads(self) -> list[int]:
        """K/V heads of each layer of the model that the plan was built for."""
    @property
    def changed_layers(self) -> list[int]:
        """The layers that the plan changes, ascending."""
    def kv_bytes_per_token(self, config: ModelConfig | _Path, value_bytes: int = 2) -> int:
        """Bytes that one token adds to the K/V cache over all layers, with `value_bytes` bytes per value."""
    def parameters(self, config: ModelConfig | _Path) -> int:
        """The number of parameters of the model under the plan."""
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self, /) -> int: ...

@final
class Method:
    """A merge method."""

    @property
    def name(self) -> str: ...
    @property
    def summary(self) -> str:
        """What the method does, in a line."""
    @property
    def needs_calibration(self) -> bool:
        """Whether the method merges from calibration text."""
    @property
    def options(self) -> list[str]:
        """Names of the options of a calibration that the method uses, such as `sequential`."""

def methods() -> list[Method]:
    """The merge methods."""

@final
class Family:
    """A model family."""

    @property
    def model_type(self) -> str:
        """`model_type` of its `config.json`."""
    @property
    def runnable(self) -> bool:
        """Whether there is a forward pass for it."""
    @staticmethod
    def targets() -> list[str]:
        """The targets that a conversion can be written for."""
    @property
    def layers_may_differ(self) -> bool:
        """Whether layers of one model may have different numbers of K/V heads."""
    @property
    def gguf(self) -> bool:
        """Whether GGUF files of it are read."""

def families() -> list[Family]:
    """The model families."""

def register_family(model_type: str | None, family: str) -> None:
    """Read checkpoints of an unknown `model_type` as those of a known family, in this process from now on.

    Every tensor of the family must be there in its shape, as always. A conversion writes a checkpoint of the family.

    Args:
        model_type: that of `config.json`; `None`: any that is not known.
        family: `model_type` of the family, such as `llama`.

    Raises:
        ArgumentError: there is no such family, or the `model_type` is a known one.
    """

def registered_families() -> list[tuple[str | None, str]]:
    """What was registered: `model_type` and family."""

def plan_merge_settings(plan: Plan | _Path | Sequence[int] | None) -> dict[str, Any]:
    """Read how a plan file merges heads: `method` and options by their names; empty for other plans.

    Raises:
        MqadaptError, OSError: the file cannot be read.
    """

@final
class Calibration:
    """Calibration text and the options of the methods that need it. `load_calibration` builds one from a file."""

    def __new__(
        cls,
        sequences: Sequence[_Ids] | None = None,
        *,
        target_context: Sequence[int] | None = None,
        stats: _Path | None = None,
        sequential: bool = False,
        refine: int = 0,
        fast_pairs: int | None = None,
        regroup: bool = True,
    ) -> Calibration:
        """Build a calibration from token sequences, each from position 0; 8,192 tokens or more are enough.

        Args:
            sequences: optional if `stats` exists and `sequential` is false.
            target_context: context lengths that the converted model is optimised for; they decide between fast and slow
                rotary pairs, layer by layer, by the measured attention-output error. By default those of 512 and 2048 that
                the longest sequence reaches, else its length.
            stats: statistics file of the whole model. It is read if it exists (and belongs to this model and text) and
                written if not, so that many plans are merged from one pass.
            sequential: refit `o_proj` of every merged layer on the hidden states of the converted model.
            refine: number of gradient steps on the projections of every merged layer before the refit, one sequence each;
                they imply `sequential`.
            fast_pairs: number of fast rotary pairs of every layer, instead of the measured one.
            regroup: allow groups of heads that are not neighbours, if the predicted error is lower.

        Raises:
            ArgumentError: `target_context` is empty, has a zero, or exceeds every sequence.
        """
    @property
    def tokens(self) -> int: ...
    @property
    def context(self) -> list[int]:
        """Lengths of the sequences in tokens, ascending; those of the statistics if there is no text."""
    @property
    def target_context(self) -> list[int]:
        """Context lengths that the converted model is optimised for."""
    def predicted_errors(
        self,
        src: _Path,
        method: str,
        layers: Sequence[tuple[int, int | LayerCache]],
        *,
        progress: _Progress | None = None,
    ) -> list[float]:
        """Predict the error of merging single layers from the statistics, without a forward pass if the statistics exist.

        Args:
            src: the model.
            method: `mean`, `first`, `prune` or `closed-form` (without refit).
            layers: pairs of a layer and what it caches, or its K/V heads.
            progress: called while statistics are collected, and for each layer.

        Returns:
            For each pair, the relative error of the attention output of the layer: the root of the lost share of its energy.

        Raises:
            ArgumentError: the method has no prediction, a layer cannot cache this, or there is neither text nor statistics.
        """
    @property
    def fingerprint(self) -> str:
        """A hash of the text, its windows and the target contexts; 16 hexadecimal digits."""

@type_check_only
class _Inspection(TypedDict):
    model_type: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: list[int]
    head_dim: int
    parameters: int
    kv_bytes_per_token: int
    dtype: str
    bytes: int

def inspect(src: _Path) -> _Inspection:
    """Return the shape, the size and the K/V heads of a model, without reading weights.

    `kv_bytes_per_token` is of a cache in the dtype of the weights, `bytes` is the size of the stored weights.

    Raises:
        MqadaptError: the checkpoint is malformed or incomplete.
        OSError: the checkpoint cannot be read.
    """

def gguf_files(path: _Path) -> list[tuple[str, bytes]]:
    """Build the files beside the weights of a GGUF file from its metadata, mainly the tokenizer: names and contents.

    Raises:
        MqadaptError: the file is malformed.
        OSError: the file cannot be read.
    """

def convert(
    src: _Path,
    dst: _Path,
    plan: Plan | _Path | Sequence[int] | None = "keep",
    method: str | None = None,
    *,
    seed: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    max_shard_size: int | None = None,
    max_memory: int = 67108864,
    sync: bool = True,
    calibration: Calibration | None = None,
    stream_download: bool = False,
    progress: _Progress | None = None,
) -> ConversionReport:
    """Convert a model: write a checkpoint whose layers have the K/V heads that the plan gives them.

    The weights stream from `src` to `dst`, so that memory use does not depend on the size of the model. `dst` appears when it
    is complete.

    Args:
        src: a folder, a `.gguf` file or a hub id.
        dst: the output folder.
        plan: as in `Plan.parse`.
        method: merge method: `mean`, `first`, `random`; `closed-form` and `prune` need a calibration. By default that of the plan
            file, else `mean`; an argument that overrides a plan file brings a warning.
        seed: seed of methods that draw random numbers; by default that of the plan file, else 0.
        dtype: dtype of the written weights; by default as stored (bfloat16 for a GGUF file).
        overwrite: replace the checkpoint in `dst` when the new one is complete.
        resume: resume an interrupted conversion, and keep the finished work if this one fails.
        max_shard_size: largest number of tensor bytes per output file; by default the files are split as in the source.
        max_memory: total size of the buffers in bytes.
        sync: flush the output to disk before the function returns.
        calibration: calibration of the methods that need one.
        stream_download: download the weight files of a hub model one at a time and delete each after it is converted, so
            that the disk holds the result and one more file.
        progress: called with the number of written bytes.

    Raises:
        ArgumentError: the plan is illegal, the method or dtype is unknown, or `dst` is or contains `src`.
        MqadaptError: the checkpoint is malformed or incomplete, or changes during the conversion.
        OSError: reading or writing failed, `dst` exists, or the disk is full.
    """

@final
class ConversionReport:
    """The report of a conversion."""

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of the written `mqadapt.json`."""
    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def peak_rss_bytes(self) -> int | None:
        """Peak memory of this process, if the system reports it."""
    @property
    def not_finite(self) -> dict[str, int]:
        """The number of infinite or NaN values of each tensor that this run copied unchanged."""
    @property
    def redone(self) -> list[str]:
        """Damaged parts of the resumed conversion that were converted again, one sentence each."""
    def to_dict(self) -> dict[str, Any]:
        """The manifest and the figures of this run as one dictionary."""

@final
class Verification:
    """The result of a verification."""

    @property
    def problems(self) -> list[str]:
        """The problems, one sentence each."""
    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
    @property
    def shards(self) -> int:
        """The number of checked files."""
    @property
    def tensors(self) -> int:
        """The number of checked tensors."""
    @property
    def bytes(self) -> int:
        """The number of checked bytes."""
    @property
    def compared(self) -> int:
        """The number of tensors that were compared with the source."""
    @property
    def not_compared(self) -> int:
        """The number of tensors that were not compared, because their method needs its calibration text."""

def verify(dst: _Path, against: _Path | None = None, *, progress: _Progress | None = None) -> Verification:
    """Verify a converted checkpoint against its manifest with its checksums, and that all values are finite.

    Args:
        dst: the converted folder.
        against: the source model: unchanged tensors are compared with it, and merged ones with the result of the method.
        progress: called with the number of read bytes.

    Raises:
        MqadaptError: the folder is not a complete converted checkpoint, or a header, index or manifest is malformed.
        OSError: the checkpoint cannot be read.
    """

@final
class HiddenStates:
    """Hidden states of sequences at the input of a layer."""

    @property
    def layer_idx(self) -> int:
        """The number of computed layers: 0 for the embeddings, `num_hidden_layers` for all."""
    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sequence."""
    @property
    def nbytes(self) -> int:
        """Size in bytes."""

@final
class RequestStates:
    """Hidden states of a list of requests at the input of a layer, for the next plan of a sweep."""

    @property
    def layer_idx(self) -> int:
        """The number of computed layers."""
    @property
    def nbytes(self) -> int:
        """Size in bytes."""

@final
class Model:
    """A loaded decoder-only language model. Calls from several threads run one after the other.

    Methods that take token ids raise `ArgumentError` for ids outside the vocabulary.
    """

    @classmethod
    def load(
        cls,
        src: _Path,
        plan: Plan | _Path | Sequence[int] | None = "keep",
        method: str | None = None,
        seed: int | None = None,
        dtype: str | None = None,
        *,
        device: str = "cpu",
        weights: str = "stored",
        kv_dtype: str | None = None,
        kv: str | None = None,
        precision: str = "fast",
        max_tokens_in_flight: int = 1024,
        calibration: Calibration | None = None,
        progress: _Progress | None = None,
    ) -> Model:
        """Load a model. A plan is applied in memory, with bitwise the same logits as the converted checkpoint.

        Args:
            src: a folder, a `.gguf` file or a hub id.
            plan: as in `Plan.parse`.
            method: merge method; by default that of the plan file, else `mean`; an argument that overrides a plan file brings a
                warning.
            seed: seed of methods that draw random numbers; by default that of the plan file, else 0.
            dtype: dtype of the weights; by default as stored.
            device: `cpu`, `cpu-stock` (the operations of candle) or `cuda:N`.
            weights: `stored`, or `int8`: 8-bit integers with a scale per row, on `cpu` only.
            kv_dtype: dtype in which the K/V cache is computed; by default that of the weights.
            kv: how the K/V cache of all layers is stored: `computed` (in `kv_dtype`), `int8` or `int4`, on `cpu` only; by default
                as the plan says.
            precision: `fast` rounds activations to bfloat16 if the weights are bfloat16, `exact` keeps them in float32.
            max_tokens_in_flight: largest number of tokens per pass; it bounds the memory of scoring and generation.
            calibration: calibration of the methods that need one.
            progress: called with the number of read bytes.

        Raises:
            ArgumentError: the plan is illegal, or the method, dtype or device is unknown.
            MqadaptError: the checkpoint is malformed or incomplete.
            OSError: the checkpoint cannot be read.
        """
    def with_plan(
        self,
        plan: Plan | _Path | Sequence[int],
        method: str | None = None,
        seed: int | None = None,
        *,
        calibration: Calibration | None = None,
        progress: _Progress | None = None,
    ) -> Model:
        """The same model under another plan for its checkpoint. Layers that neither plan changes are shared.

        How the K/V cache is stored is a part of the plan: what `kv` said when the model was loaded does not count.
        """
    def with_layers_of(self, layers: Sequence[tuple[int, Model]]) -> Model:
        """The same model with some layers of other models of the same checkpoint, dtype and device.

        All weights are shared: a sweep merges every layer once and assembles plans from merged layers.
        """
    @property
    def config(self) -> ModelConfig:
        """The configuration, with the K/V heads of the plan."""
    @property
    def plan(self) -> Plan: ...
    @property
    def dtype(self) -> str:
        """The dtype of the weights."""
    @property
    def fingerprint(self) -> str:
        """A hash of everything that determines the results: checkpoint, plan, method, dtypes, device; 16 hexadecimal digits."""
    @property
    def stop_tokens(self) -> list[int]:
        """The end-of-text tokens of `generation_config.json` or `config.json`."""
    def kv_bytes(self) -> int:
        """Allocated bytes of the K/V cache."""
    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in the K/V cache."""
    @property
    def kv_value_bytes(self) -> int:
        """Bytes of one value in the K/V cache."""
    def bytes_per_step(self, depth: int) -> int:
        """Bytes that one decode step reads with `depth` cached tokens: the weights and the cache."""
    def measure_decode(
        self, depth: int, steps: int, sequences: int = 1, *, progress: _Progress | None = None
    ) -> list[float]:
        """Measure decode steps with `depth` cached tokens, for one sequence or a batch: seconds of each step."""
    def measure_prefill(self, tokens: int, passes: int, *, progress: _Progress | None = None) -> list[float]:
        """Measure passes over a prompt of `tokens` tokens: seconds of each pass."""
    def logits(self, ids: _Ids, *, progress: _Progress | None = None) -> NDArray[np.float32]:
        """Logits of every position, `[seq_len, vocab_size]`."""
    def logits_in_steps(
        self, ids: _Ids, steps: Sequence[int], *, progress: _Progress | None = None
    ) -> NDArray[np.float32]:
        """As `logits`, computed through the K/V cache in pieces of these lengths, and the rest in one piece."""
    def hidden_states(self, ids: _Ids, *, progress: _Progress | None = None) -> list[NDArray[np.float32]]:
        """The `output_hidden_states` of transformers, each `[seq_len, hidden_size]`.

        These are the embeddings, the output of every layer except the last, and the output of the final norm.
        """
    def loglikelihood(
        self, requests: Sequence[tuple[_Ids, _Ids]], *, progress: _Progress | None = None
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation), its log-likelihood in nats and whether greedy decoding gives it.

        Shared prefixes of requests are computed once.
        """
    def loglikelihood_from(
        self,
        requests: Sequence[tuple[_Ids, _Ids]],
        start: RequestStates | None = None,
        keep: Sequence[int] = ...,
        *,
        progress: _Progress | None = None,
    ) -> tuple[list[tuple[float, bool]], list[RequestStates]]:
        """As `loglikelihood`, bitwise, for a sweep over plans.

        The computation continues from the hidden states `start` that an earlier call with the same requests returned (of a
        model with the same layers before them). It also returns the hidden states at the inputs of the layers `keep`.
        """
    def perplexity(
        self, ids: _Ids, context: int, windows: int | None = None, *, progress: _Progress | None = None
    ) -> float:
        """Perplexity over windows of `context` tokens that do not overlap: the first `windows` or all.

        The mean is over all tokens of a window except the first; an incomplete last window is ignored.
        """
    @overload
    def generate(
        self,
        ids: _Ids,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_tokens: _Ids | None = None,
        on_token: Callable[[int, int], object] | None = None,
        progress: _Progress | None = None,
    ) -> list[int]: ...
    @overload
    def generate(
        self,
        ids: Sequence[_Ids],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        stop_tokens: _Ids | None = None,
        on_token: Callable[[int, int], object] | None = None,
        progress: _Progress | None = None,
    ) -> list[list[int]]:
        """Generate the tokens after one prompt, or after each of several.

        Args:
            ids: a prompt, or a list of prompts.
            max_new_tokens: largest number of new tokens per prompt. With `rope_type` `dynamic` or `longrope` it counts as part of
                the text's length, on which the rotation depends beyond the original context.
            temperature: sampling temperature; 0 always takes the most likely token.
            top_k: sample among this many most likely tokens.
            top_p: sample among the most likely tokens that together have this probability.
            seed: seed of sampling; the draws of a sequence depend only on it and on the index of the sequence.
            stop_tokens: tokens that end a sequence and are not part of it; by default those of the model.
            on_token: called as `on_token(index, token)` for every new token; `False` ends the sequence. It cannot call the model.
            progress: called with the number of finished sequences.
        """
    def hidden_before(
        self, layer_idx: int, sequences: Sequence[_Ids], *, progress: _Progress | None = None
    ) -> HiddenStates:
        """The hidden states at the input of layer `layer_idx` (`num_hidden_layers`: after the last layer)."""
    def forward_from(self, hidden: HiddenStates, layer_idx: int, *, progress: _Progress | None = None) -> HiddenStates:
        """Continue from hidden states up to the input of layer `layer_idx`."""
    def nll(
        self, hidden: HiddenStates, sequences: Sequence[_Ids], *, progress: _Progress | None = None
    ) -> NDArray[np.float64]:
        """Negative log-likelihood in nats of every token except the first of each sequence.

        `hidden` are the hidden states after the last layer.
        """
    def kl_divergences(
        self, reference: HiddenStates, hidden: Sequence[HiddenStates], *, progress: _Progress | None = None
    ) -> list[NDArray[np.float64]]:
        """As `kl_divergence`, of several models from one reference, whose logits are computed once."""
    def kl_divergence(
        self, reference: HiddenStates, hidden: HiddenStates, *, progress: _Progress | None = None
    ) -> NDArray[np.float64]:
        """For every token, the divergence of the next-token distribution from that of a reference model, in nats.

        It is `sum_i p_i (ln p_i - ln q_i)` with `p` of `reference` and `q` of `hidden`, the hidden states after the last layer.
        """
