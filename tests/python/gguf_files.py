"""GGUF files of transformers' models, written the way llama.cpp's `convert_hf_to_gguf.py` does it, and a reader.

In: a model of transformers and a tensor type. Out: a GGUF file, and the values that it holds, by name and in the order of the
model. Names come from the package `gguf`; nothing here uses mqadapt-rs.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from transformers import PreTrainedModel

ARCHITECTURES = {"gemma3_text": "gemma3"}
# types that the package `gguf` dequantises but does not quantise: bytes of a block, and where its half-precision scales are
NOISE = {Type.Q4_K: (144, (0, 2)), Type.Q5_K: (176, (0, 2)), Type.Q6_K: (210, (208,))}


def write(path: Path, model: PreTrainedModel, kind: Type = Type.F32) -> dict[str, np.ndarray]:
    """Writes `path`, matrices in `kind`, the rest in F32. Returns what it holds: f32 values by the model's names."""
    config = model.config
    name = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, name)
    _write_sizes(writer, config)
    writers = {"gemma2": _write_gemma2, "gemma3_text": _write_gemma3, "phi3": _write_phi3, "gpt2": _write_gpt2}
    writers.get(config.model_type, _write_rope)(writer, config)
    names = gguf.get_tensor_name_map(_architecture(name), config.num_hidden_layers)
    held = {}
    for own, parameter in model.state_dict().items():
        if own == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = _stored(own, parameter.float().numpy(), config)
        raw, values = _encode(stored, kind if stored.ndim == 2 else Type.F32)
        writer.add_tensor(
            names.get_name(own, try_suffixes=(".weight", ".bias")), raw, raw_dtype=kind if stored.ndim == 2 else None
        )
        held[own] = _restored(own, values, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _architecture(name: str) -> gguf.MODEL_ARCH:
    return next(number for number, own in gguf.MODEL_ARCH_NAMES.items() if own == name)


def _encode(values: np.ndarray, kind: Type) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of a type, and the values that they stand for."""
    if kind in NOISE:
        block, scales = NOISE[kind]
        draw = np.random.default_rng(values.size)
        raw = draw.integers(0, 256, (values.shape[0], values.shape[1] // 256, block), np.uint8)
        for at in scales:
            raw[..., at : at + 2] = (
                draw.uniform(0.001, 0.1, raw.shape[:-1]).astype(np.float16)[..., None].view(np.uint8)
            )
        raw = raw.reshape(values.shape[0], -1)
    elif kind in (Type.F32, Type.F16):
        raw = values.astype(np.float32 if kind == Type.F32 else np.float16)
        return raw, raw.astype(np.float32)
    else:
        raw = gguf.quants.quantize(values, kind)
    return raw, gguf.quants.dequantize(raw, kind)


def _heads(name: str, config: Any) -> int | None:
    """Heads whose rows a Llama's file has in another order."""
    if config.model_type != "llama":
        return None
    return next((n for part, n in _head_counts(config) if f".{part}." in name), None)


def _head_counts(config: Any) -> tuple[tuple[str, int], ...]:
    return ("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)


def _plus_one(name: str, config: Any) -> bool:
    return bool(config.model_type.startswith("gemma")) and name.endswith("norm.weight")


def _transposed(name: str, values: np.ndarray, config: Any) -> bool:
    return bool(config.model_type == "gpt2") and values.ndim == 2 and ".c_" in name


def _stored(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    if _plus_one(name, config):
        return values + np.float32(1)
    if _transposed(name, values, config):
        return np.ascontiguousarray(values.T)
    if (heads := _heads(name, config)) is None:
        return values
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _restored(name: str, values: np.ndarray, config: Any) -> np.ndarray:
    if _plus_one(name, config):
        return values - np.float32(1)
    if _transposed(name, values, config):
        return np.ascontiguousarray(values.T)
    if (heads := _heads(name, config)) is None:
        return values
    return values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _write_sizes(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.model_type not in ("phi3", "gpt2") and (head_dim := getattr(config, "head_dim", None)):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    for name in ("bos", "eos", "pad"):
        if (token := getattr(config, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)


def _write_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    if config.model_type != "gemma":  # whose converter leaves it out
        writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(rope, config.head_dim))


def _llama3_divisors(rope: dict[str, Any], head_dim: int) -> np.ndarray:
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    out = []
    for frequency in rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim):
        wavelength = 2 * math.pi / frequency
        smooth = min(max((original / wavelength - low) / (high - low), 0), 1)
        out.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(out, np.float32)


def _write_gemma2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_sliding_window(config.sliding_window)


def _write_gemma3(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters["full_attention"]
    local = config.rope_parameters["sliding_attention"]["rope_theta"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if local != 10_000:  # llama.cpp's default, which most files leave out
        writer.add_float32("gemma3.rope.freq_base_swa", local)
    writer.add_sliding_window(config.sliding_window)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def _write_phi3(writer: gguf.GGUFWriter, config: Any) -> None:
    rope, original = config.rope_parameters, config.original_max_position_embeddings
    head_dim = config.hidden_size // config.num_attention_heads
    writer.add_rope_scaling_orig_ctx_len(original)
    writer.add_rope_dimension_count(int(rope["partial_rotary_factor"] * head_dim))
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_sliding_window(config.sliding_window or 0)
    if rope["rope_type"] == "longrope":
        scale = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0)
        for length in ("long", "short"):
            writer.add_tensor(f"rope_factors_{length}.weight", np.array(rope[f"{length}_factor"], np.float32))


def _write_gpt2(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)


class StoredTensor(NamedTuple):
    """A tensor of a file: shape with the outermost dimension first, bytes as they stand."""

    shape: tuple[int, ...]
    kind: Type
    raw: np.ndarray

    def values(self, rows: slice = slice(None)) -> np.ndarray:
        """Rows in f32, as the package `gguf` reads them."""
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        raw = self.raw.reshape(*self.shape[:-1], self.shape[-1] // block_values * block_bytes)
        if len(self.shape) == 1:
            return gguf.quants.dequantize(raw, self.kind)
        return gguf.quants.dequantize(raw[rows], self.kind)


class GgufFile:
    """Metadata and tensors of a file (little-endian, version 3). The package `gguf` takes long for a large vocabulary."""

    def __init__(self, path: Path) -> None:
        self._bytes = np.memmap(path, np.uint8, "r")
        self._at = 8
        tensors, pairs = self._number("<Q"), self._number("<Q")
        self.metadata = {self._text(): self._value(self._number("<I")) for _ in range(pairs)}
        infos = {self._text(): self._info() for _ in range(tensors)}
        alignment = self.metadata.get("general.alignment", 32)
        start = -(-self._at // alignment) * alignment
        self.tensors = {name: self._tensor(start, *info) for name, info in infos.items()}

    def _number(self, kind: str) -> Any:
        (number,) = struct.unpack_from(kind, self._bytes, self._at)
        self._at += struct.calcsize(kind)
        return number

    def _text(self) -> str:
        length = self._number("<Q")
        self._at += length
        return bytes(self._bytes[self._at - length : self._at]).decode()

    def _value(self, kind: int) -> Any:
        if kind == 8:
            return self._text()
        if kind == 9:
            kind, count = self._number("<I"), self._number("<Q")
            return [self._value(kind) for _ in range(count)]
        return self._number(
            "<" + {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}[kind]
        )

    def _info(self) -> tuple[tuple[int, ...], Type, int]:
        sizes = [self._number("<Q") for _ in range(self._number("<I"))]
        return tuple(reversed(sizes)), Type(self._number("<I")), self._number("<Q")

    def _tensor(self, start: int, shape: tuple[int, ...], kind: Type, offset: int) -> StoredTensor:
        block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        count = math.prod(shape) // block_values * block_bytes
        return StoredTensor(shape, kind, self._bytes[start + offset : start + offset + count])
