"""Types of the extension module. The public names are those of `mqadapt_rs`."""

import os
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeAlias, TypedDict, final, overload, type_check_only

import numpy as np
from numpy.typing import NDArray

_Path: TypeAlias = str | os.PathLike[str]
_Ids: TypeAlias = Sequence[int] | NDArray[np.integer[Any]]
# called as progress(phase, done, total), about twenty times a second; an exception in it stops the work and is raised
_Progress: TypeAlias = Callable[[str, int, int], object]

__all__ = [
    "Calibration",
    "ConversionReport",
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
    "gguf_files",
    "inspect",
    "methods",
    "verify",
]
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

    def __new__(cls, num_key_value_heads: int) -> LayerCache:
        """K/V heads, stored in the dtype that they are computed in.

        Raises:
            ArgumentError: there is none.
        """
    @property
    def num_key_value_heads(self) -> int: ...
    def reductions(self) -> list[LayerCache]:
        """What a layer that caches this may be reduced to, ascending by bytes; the last is this."""
    def bytes_per_token(self, config: ModelConfig | _Path, value_bytes: int = 2) -> int:
        """Bytes that one token adds to the cache of a layer, with `value_bytes` bytes a computed value."""
    def __eq__(self, other: object, /) -> bool: ...
    def __ne__(self, other: object, /) -> bool: ...
    def __hash__(self, /) -> int: ...
    def __reduce__(self, /) -> tuple[type[LayerCache], tuple[int]]: ...

@final
class Plan:
    """What each layer of a model caches. Equal and hashable by content."""

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
class Calibration:
    """Calibration text, and what the methods that merge from it are told. `load_calibration` makes one from a file."""

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
        """Token sequences, each from position 0; 8,192 tokens or more are enough.

        Args:
            sequences: may be left out where `stats` exists and `sequential` is false.
            target_context: contexts in tokens that the converted model is for; they decide between fast and slow
                rotary pairs, layer by layer, by the measured attention-output error. By default 512 and 2048, as far as
                the longest sequence reaches, else its length.
            stats: a file of statistics of the whole model. It is used where it exists (and is of this model and text)
                and written where it does not, so that many plans are merged from one pass.
            sequential: refit `o_proj` of every merged layer on the converted model's own stream.
            refine: gradient steps on the projections of every merged layer, one sequence each, before that; they imply
                `sequential`.
            fast_pairs: fast rotary pairs of every layer, instead of measuring.
            regroup: may let heads share that are not neighbours, where that is predicted to cost less.

        Raises:
            ArgumentError: an empty or zero `target_context`, or one longer than every sequence.
        """
    @property
    def tokens(self) -> int: ...
    @property
    def context(self) -> list[int]:
        """Lengths of the sequences in tokens, ascending; those of the statistics where there is no text."""
    @property
    def target_context(self) -> list[int]:
        """Contexts in tokens that the converted model is for."""
    def predicted_errors(
        self,
        src: _Path,
        method: str,
        layers: Sequence[tuple[int, int | LayerCache]],
        *,
        progress: _Progress | None = None,
    ) -> list[float]:
        """What the statistics say of merging single layers: no forward pass, but where statistics are collected first.

        Args:
            src: the model.
            method: `mean`, `first`, `prune` or `closed-form` (without refit).
            layers: each a layer and what it caches, or its K/V heads.
            progress: is told of statistics that are collected, and of layers.

        Returns:
            For each, the relative error of the layer's attention output: the root of the share of its energy that is lost.

        Raises:
            ArgumentError: another method, illegal heads, or neither text nor statistics.
        """
    @property
    def fingerprint(self) -> str:
        """Names the text, its windows and the target contexts; 16 hexadecimal digits."""

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
    """What a model is: its shape, its size, the K/V heads of its layers. Reads no weights.

    `kv_bytes_per_token` is for a cache of the weights' dtype, `bytes` the size of the stored weights.

    Raises:
        MqadaptError: a malformed or incomplete checkpoint.
        OSError: it cannot be read.
    """

def gguf_files(path: _Path) -> list[tuple[str, bytes]]:
    """Names and contents of what goes along with a GGUF file's weights, made from its metadata: the tokenizer, mostly.

    Raises:
        MqadaptError: a malformed file.
        OSError: it cannot be read.
    """

def convert(
    src: _Path,
    dst: _Path,
    plan: Plan | _Path | Sequence[int] | None = "keep",
    method: str = "mean",
    *,
    seed: int = 0,
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
    """Writes a checkpoint in which every layer has the K/V heads that the plan says.

    The weights stream from `src` to `dst`, so that memory does not depend on the model. `dst` appears when it is complete.

    Args:
        src: a folder, a `.gguf` file or a hub id.
        dst: the new folder.
        plan: as `Plan.parse` takes it.
        method: how heads are merged: `mean`, `first`, `random`; `closed-form` and `prune` need a calibration.
        seed: of methods that draw random numbers.
        dtype: of the written weights; by default as stored (of a GGUF file: bfloat16).
        overwrite: replace a checkpoint that `dst` holds, once the new one is complete.
        resume: continue a conversion that was killed, and leave one that fails for the next attempt.
        max_shard_size: cut the output into files of at most this many bytes of tensors; by default as the source.
        max_memory: bytes of buffers.
        sync: wait until the disk has everything.
        calibration: text of the methods that merge from it.
        stream_download: of a hub id, fetch one weight file at a time and drop it when it is converted, so that the disk
            holds the result and one file more.
        progress: told the bytes written.

    Raises:
        ArgumentError: an illegal plan, an unknown method or dtype, a `dst` that is or holds `src`.
        MqadaptError: a malformed or incomplete checkpoint, or one that changes meanwhile.
        OSError: reading or writing failed, `dst` exists, the disk is too small.
    """

@final
class ConversionReport:
    """What a conversion did."""

    @property
    def manifest(self) -> dict[str, Any]:
        """The content of the `mqadapt.json` that was written."""
    @property
    def bytes_read(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def peak_rss_bytes(self) -> int | None:
        """Most memory that this process ever held, where the system tells."""
    @property
    def not_finite(self) -> dict[str, int]:
        """Values that are infinite or NaN, of each tensor that this run copied as it is."""
    @property
    def redone(self) -> list[str]:
        """What of the resumed conversion was damaged and was done again, a sentence each."""
    def to_dict(self) -> dict[str, Any]:
        """The manifest and the figures of this run in one dictionary."""

@final
class Verification:
    """What a verification found."""

    @property
    def problems(self) -> list[str]:
        """What is wrong, a sentence each."""
    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
    @property
    def shards(self) -> int:
        """Files checked."""
    @property
    def tensors(self) -> int:
        """Tensors checked."""
    @property
    def bytes(self) -> int:
        """Bytes checked."""
    @property
    def compared(self) -> int:
        """Tensors compared with the source."""
    @property
    def not_compared(self) -> int:
        """Tensors that were not, because the method that made them needs its calibration text."""

def verify(dst: _Path, against: _Path | None = None, *, progress: _Progress | None = None) -> Verification:
    """Whether a converted checkpoint is what its manifest says, down to its checksums, and all its values are finite.

    Args:
        dst: the converted folder.
        against: the model that it was made from: untouched tensors must be the same, and touched ones what the
            manifest's method gives.
        progress: told the bytes read.

    Raises:
        MqadaptError: not a converted checkpoint, or an unfinished one, or a header, index or manifest is malformed.
        OSError: it cannot be read.
    """

@final
class HiddenStates:
    """Residual streams of some sequences at the entrance of a layer."""

    @property
    def layer_idx(self) -> int:
        """Layers that have been run: 0 is the embeddings, `num_hidden_layers` all of them."""
    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""

@final
class RequestStates:
    """Residual streams of a list of requests at the entrance of a layer, kept for the next plan of a sweep."""

    @property
    def layer_idx(self) -> int:
        """Layers that have been run."""
    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""

@final
class Model:
    """A decoder-only language model, ready to run. Calls from several threads wait for each other.

    Every method that takes token ids raises `ArgumentError` for ids outside the vocabulary.
    """

    @classmethod
    def load(
        cls,
        src: _Path,
        plan: Plan | _Path | Sequence[int] | None = "keep",
        method: str = "mean",
        seed: int = 0,
        dtype: str | None = None,
        *,
        device: str = "cpu",
        weights: str = "stored",
        kv_dtype: str | None = None,
        precision: str = "fast",
        max_tokens_in_flight: int = 1024,
        calibration: Calibration | None = None,
        progress: _Progress | None = None,
    ) -> Model:
        """Loads a model. A plan is applied in memory, with the logits of the converted checkpoint bit for bit.

        Args:
            src: a folder, a `.gguf` file or a hub id.
            plan: as `Plan.parse` takes it.
            method: how heads are merged.
            seed: of methods that draw random numbers.
            dtype: of the weights; by default as stored.
            device: `cpu`, `cpu-stock` (candle's own operations) or `cuda:N`.
            weights: `stored`, or `int8`: 8-bit integers with a scale for every row, on `cpu` only.
            kv_dtype: of the K/V cache; by default that of the weights.
            precision: `fast` rounds activations to bfloat16 where weights are bfloat16, `exact` keeps them float32.
            max_tokens_in_flight: most tokens computed in one pass; bounds the memory of scoring and generation.
            calibration: text of the methods that merge from it, `closed-form` and `prune`.
            progress: told the bytes read.

        Raises:
            ArgumentError: an illegal plan, an unknown method, dtype or device.
            MqadaptError: a malformed or incomplete checkpoint.
            OSError: it cannot be read.
        """
    def with_plan(
        self,
        plan: Plan | _Path | Sequence[int],
        method: str = "mean",
        seed: int = 0,
        *,
        calibration: Calibration | None = None,
        progress: _Progress | None = None,
    ) -> Model:
        """The same model under another plan for its checkpoint. Layers that neither changes are shared."""
    def with_layers_of(self, layers: Sequence[tuple[int, Model]]) -> Model:
        """The same model with some layers taken from models of the same checkpoint, dtype and device.

        All weights are shared: a sweep merges every layer once, and puts plans together from what it has.
        """
    @property
    def config(self) -> ModelConfig:
        """The configuration, its K/V heads those of the plan."""
    @property
    def plan(self) -> Plan: ...
    @property
    def dtype(self) -> str:
        """Of the weights."""
    @property
    def fingerprint(self) -> str:
        """Names what this model computes: checkpoint, plan, method, dtypes, device; 16 hexadecimal digits."""
    @property
    def stop_tokens(self) -> list[int]:
        """The tokens that end a text, by `generation_config.json` or `config.json`."""
    def kv_bytes(self) -> int:
        """Bytes of K/V cache that are allocated now."""
    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in the K/V cache."""
    @property
    def kv_value_bytes(self) -> int:
        """Bytes of one value in the K/V cache."""
    def bytes_per_step(self, depth: int) -> int:
        """Bytes that one decode step reads with `depth` tokens cached: the weights, and the cache."""
    def measure_decode(
        self, depth: int, steps: int, sequences: int = 1, *, progress: _Progress | None = None
    ) -> list[float]:
        """Seconds of each of some decode steps with `depth` tokens cached, for one sequence or several side by side."""
    def measure_prefill(self, tokens: int, passes: int, *, progress: _Progress | None = None) -> list[float]:
        """Seconds of each of some passes over a prompt of this many tokens."""
    def logits(self, ids: _Ids, *, progress: _Progress | None = None) -> NDArray[np.float32]:
        """Logits of every position, `[seq_len, vocab_size]`."""
    def logits_in_steps(
        self, ids: _Ids, steps: Sequence[int], *, progress: _Progress | None = None
    ) -> NDArray[np.float32]:
        """As `logits`, fed through the K/V cache in pieces of these lengths, and the rest in one."""
    def hidden_states(self, ids: _Ids, *, progress: _Progress | None = None) -> list[NDArray[np.float32]]:
        """What transformers calls `output_hidden_states`, each `[seq_len, hidden_size]`.

        The embeddings, the output of every layer but the last, and the final norm's output.
        """
    def loglikelihood(
        self, requests: Sequence[tuple[_Ids, _Ids]], *, progress: _Progress | None = None
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood in nats, and whether greedy decoding gives it.

        What requests have in common is computed once.
        """
    def loglikelihood_from(
        self,
        requests: Sequence[tuple[_Ids, _Ids]],
        start: RequestStates | None = None,
        keep: Sequence[int] = ...,
        *,
        progress: _Progress | None = None,
    ) -> tuple[list[tuple[float, bool]], list[RequestStates]]:
        """As `loglikelihood`, bit for bit, for a sweep over plans.

        Goes on from the residual streams `start` that an earlier call with the same requests kept (of a model with the
        same layers before them), and returns those that enter the layers `keep`.
        """
    def perplexity(
        self, ids: _Ids, context: int, windows: int | None = None, *, progress: _Progress | None = None
    ) -> float:
        """Perplexity over non-overlapping windows of `context` tokens, the first `windows` of them or all.

        The mean is over all tokens of a window but its first; a rest shorter than a window is left out.
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
        """The new tokens after one prompt, or after each of several.

        Args:
            ids: a prompt, or a list of prompts.
            max_new_tokens: most new tokens of each.
            temperature: 0 takes the most likely token always.
            top_k: sample among this many most likely tokens.
            top_p: sample among the most likely tokens that together have this probability.
            seed: of sampling; a sequence's draws depend on it and on the sequence's index alone.
            stop_tokens: end a sequence and are not part of it; by default the model's own.
            on_token: called as `on_token(index, token)` for every new token; a false answer ends the sequence.
            progress: told the sequences finished.
        """
    def hidden_before(
        self, layer_idx: int, sequences: Sequence[_Ids], *, progress: _Progress | None = None
    ) -> HiddenStates:
        """The residual streams entering layer `layer_idx` (`num_hidden_layers`: behind the last)."""
    def forward_from(self, hidden: HiddenStates, layer_idx: int, *, progress: _Progress | None = None) -> HiddenStates:
        """Goes on from residual streams up to the entrance of layer `layer_idx`."""
    def nll(
        self, hidden: HiddenStates, sequences: Sequence[_Ids], *, progress: _Progress | None = None
    ) -> NDArray[np.float64]:
        """Negative log-likelihood in nats of every token but the first of each sequence.

        `hidden` are the residual streams behind the last layer.
        """
    def kl_divergences(
        self, reference: HiddenStates, hidden: Sequence[HiddenStates], *, progress: _Progress | None = None
    ) -> list[NDArray[np.float64]]:
        """As `kl_divergence`, of several models from one, whose logits are computed once."""
    def kl_divergence(
        self, reference: HiddenStates, hidden: HiddenStates, *, progress: _Progress | None = None
    ) -> NDArray[np.float64]:
        """For every token, the divergence of the next-token distribution from that of another model, in nats.

        `sum_i p_i (ln p_i - ln q_i)` with `p` of `reference` and `q` of `hidden`, residual streams behind the last layer.
        """
