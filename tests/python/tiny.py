"""Tiny checkpoints for the tests, and an independent PyTorch version of what `convert` does to them.

In: a family and a shape. Out: folders in Hugging Face layout, written by transformers itself, and transformers models that
compute what a converted checkpoint should compute. Nothing here uses mqadapt-rs: it is the other side of the comparison.
"""

from __future__ import annotations

import copy
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

CLASSES = {
    "llama": "Llama",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "granite": "Granite",
    "mistral": "Mistral",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "phi3": "Phi3",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "starcoder2": "Starcoder2",
}
FAMILIES = tuple(CLASSES)

# their norms multiply by 1 + weight, and their embeddings are scaled by a number rounded to the dtype of the weights
GEMMAS = ("gemma", "gemma2", "gemma3_text")
# the keys of all heads are normalised together
NORMS_OVER_HEADS = ("olmo2", "olmo3")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# tests run side by side, and PyTorch's threads wait for each other by spinning
torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))

SHAPE: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


ALTERNATING = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
# what makes a family what it is, in three layers
OWN: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 9, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 5.0,
               "final_logit_softcapping": 4.0},
    "gemma3_text": {**ALTERNATING, "query_pre_attn_scalar": 12, "rope_local_base_freq": 100.0},
    "granite": {"embedding_multiplier": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.4,
                "logits_scaling": 2.5},
    # transformers 4.57 has one base for both kinds
    "olmo3": {**ALTERNATING, "rope_parameters": {
        kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
}  # fmt: skip


def base_class(family: str) -> str:
    """Its class without an output projection."""
    return {"gemma3_text": "Gemma3TextModel"}.get(family, f"{CLASSES[family]}Model")


def config(family: str, **changes: Any) -> Any:
    """A configuration of the family: `SHAPE`, what is the family's `OWN`, and `changes`."""
    own = {**SHAPE, **OWN.get(family, {}), **changes}
    layers = own["num_hidden_layers"]
    for field in {"layer_types", "no_rope_layers"} & own.keys() - changes.keys():
        own[field] = (own[field] * layers)[:layers]
    return AutoConfig.for_model(family, **own)


def model(family: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model. Every parameter matters: biases and norms are drawn too (transformers starts them at 0 and 1), and
    weights are large enough that attention is far from uniform."""
    out = AutoModelForCausalLM.from_config(
        config(family, **changes), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in out.named_parameters():
            values = torch.randn(parameter.shape, generator=draw)
            if name.endswith("norm.weight"):
                parameter.copy_(0.3 * values + (0.0 if family in GEMMAS else 1.0))
            elif parameter.dim() == 1:
                parameter.copy_(0.3 * values)
            else:
                parameter.copy_(1.5 * values / parameter.shape[1] ** 0.5)
    return out


def save(
    folder: Path, family: str, seed: int = 0, dtype: str = "float32", max_shard_size: str = "5GB", **changes: Any
) -> Path:
    """Writes a random checkpoint of the family to `folder`, which it returns."""
    model(family, seed, **changes).to(DTYPES[dtype]).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32, **kwargs: Any) -> PreTrainedModel:
    """The checkpoint in transformers, eager attention unless told otherwise."""
    kwargs.setdefault("attn_implementation", "eager")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **kwargs).eval()


def ids(count: int, vocab_size: int = SHAPE["vocab_size"], seed: int = 0) -> list[int]:
    """Random token ids."""
    return torch.randint(3, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def logits(reference: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """Logits of all positions, `[seq_len, vocab_size]`, f32."""
    with torch.no_grad():
        return reference(torch.tensor([tokens])).logits[0].float().numpy()


CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path, text: str, vocab_size: int = 320, starts_with_bos: bool = False) -> int:
    """Writes a byte-level BPE tokenizer trained on `text` into `folder`; returns its size. `<s>` is 1, `</s>` is 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    if starts_with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    description = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(description))
    return int(tokenizer.get_vocab_size())


def merge_heads(weight: torch.Tensor, heads: int, method: str) -> torch.Tensor:
    """Contiguous groups of the K/V heads in `weight` (`[G, head_dim, ...]`) merged to `heads`: `[heads, head_dim, ...]`, f32.
    Sums are in f64, so that the mean is the exact one, rounded."""
    groups = weight.double().reshape(heads, weight.shape[0] // heads, *weight.shape[1:])
    return {"mean": lambda: groups.mean(1), "first": lambda: groups[:, 0]}[method]().float()


def kv_rows(name: str, value: torch.Tensor, config: Any) -> list[slice]:
    """The rows of a tensor that belong to K/V heads: of `k_proj` and `v_proj`, of two parts of a fused `qkv_proj`, of a norm
    over all heads. Of other tensors none."""
    rows = config.num_key_value_heads * config.head_dim
    parts = name.split(".")
    if "qkv_proj" in parts:
        query = config.num_attention_heads * config.head_dim
        return [slice(query, query + rows), slice(query + rows, query + 2 * rows)]
    if {"k_proj", "v_proj"} & set(parts) or ("k_norm" in parts and config.model_type in NORMS_OVER_HEADS):
        assert len(value) == rows, name
        return [slice(0, rows)]
    return []


def merge_kv(name: str, value: torch.Tensor, heads: int, method: str, config: Any) -> torch.Tensor:
    """The tensor with its K/V heads merged to `heads`, rounded to its dtype."""
    rows = kv_rows(name, value, config)
    if not rows:
        return value
    merged = [
        merge_heads(value[part].reshape(-1, config.head_dim, *value.shape[1:]), heads, method)
        .to(value.dtype)
        .reshape(-1, *value.shape[1:])
        for part in rows
    ]
    return torch.cat([value[: rows[0].start], *merged, value[rows[-1].stop :]])


def repeat_kv(name: str, value: torch.Tensor, times: int, config: Any) -> torch.Tensor:
    """The tensor with each of its K/V heads repeated."""
    rows = kv_rows(name, value, config)
    if not rows:
        return value
    repeated = [
        value[part]
        .reshape(-1, config.head_dim, *value.shape[1:])
        .repeat_interleave(times, 0)
        .reshape(-1, *value.shape[1:])
        for part in rows
    ]
    return torch.cat([value[: rows[0].start], *repeated, value[rows[-1].stop :]])


def convert(source: PreTrainedModel, plan: list[int], method: str) -> PreTrainedModel:
    """`source` changed in place to compute what its conversion to `plan` computes: each merged head, rounded to the model's
    dtype, repeated over the heads that it replaces. No layer changes its shape, so that no code but transformers' own runs."""
    merged_config = copy.copy(source.config)
    with torch.no_grad():
        for heads, layer in zip(plan, source.model.layers, strict=True):
            merged_config.num_key_value_heads = heads
            times = source.config.num_key_value_heads // heads
            for name, parameter in layer.self_attn.named_parameters():
                merged = merge_kv(name, parameter, heads, method, source.config)
                parameter.copy_(repeat_kv(name, merged, times, merged_config))
    return source


def expand(source: PreTrainedModel, heads: int) -> PreTrainedModel:
    """The same function with `heads` K/V heads in every layer, each head of `source` repeated."""
    changed = AutoConfig.for_model(**{**source.config.to_dict(), "num_key_value_heads": heads})
    out = AutoModelForCausalLM.from_config(changed, dtype=source.dtype, attn_implementation="eager").eval()
    state = source.state_dict()
    for name, value in state.items():
        state[name] = repeat_kv(name, value, heads // source.config.num_key_value_heads, source.config)
    out.load_state_dict(state)
    return out


def save_mixed(folder: Path, source: PreTrainedModel, plan: list[int]) -> Path:
    """Writes `source` with `plan[i]` K/V heads in layer i (the mean of its heads), as another tool would: a
    `per_layer_config` with an entry for every layer, no modelling file, weights in one shard."""
    from safetensors.torch import save_file

    tensors = {}
    for name, value in source.state_dict().items():
        if name == "lm_head.weight" and source.config.tie_word_embeddings:
            continue
        heads = plan[int(name.split(".")[2])] if ".layers." in name else 0
        tensors[name] = merge_kv(name, value, heads, "mean", source.config).contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    description = source.config.to_dict()
    description["num_key_value_heads"] = max(plan)
    description["per_layer_config"] = {str(i): {"num_key_value_heads": heads} for i, heads in enumerate(plan)}
    description["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(description))
    return folder


def save_stories(binary: Path, folder: Path) -> Path:
    """Writes a llama2.c checkpoint (version 0) as a Hugging Face folder, Q/K rows permuted to its rotary layout."""
    raw = binary.read_bytes()
    dim, hidden_dim, layers, heads, kv_heads, vocab, seq_len = struct.unpack("<7i", raw[:28])
    tied, vocab = vocab > 0, abs(vocab)
    values = torch.frombuffer(bytearray(raw[28:]), dtype=torch.float32)
    position = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal position
        count = int(np.prod(shape))
        position += count
        return values[position - count : position].reshape(shape).clone()

    head_dim = dim // heads

    def rotary(weight: torch.Tensor, count: int) -> torch.Tensor:
        # pairs (2j, 2j + 1) become (j, j + head_dim / 2)
        return weight.reshape(count, head_dim // 2, 2, dim).transpose(1, 2).reshape(count * head_dim, dim)

    state = {"model.embed_tokens.weight": take(vocab, dim)}
    names = [
        ("input_layernorm", (dim,)),
        ("self_attn.q_proj", (dim, dim)),
        ("self_attn.k_proj", (kv_heads * head_dim, dim)),
        ("self_attn.v_proj", (kv_heads * head_dim, dim)),
        ("self_attn.o_proj", (dim, dim)),
        ("post_attention_layernorm", (dim,)),
        ("mlp.gate_proj", (hidden_dim, dim)),
        ("mlp.down_proj", (dim, hidden_dim)),
        ("mlp.up_proj", (hidden_dim, dim)),
    ]
    for name, shape in names:
        for i, weight in enumerate(take(layers, *shape)):
            count = {"self_attn.q_proj": heads, "self_attn.k_proj": kv_heads}.get(name)
            state[f"model.layers.{i}.{name}.weight"] = rotary(weight, count) if count else weight
    state["model.norm.weight"] = take(dim)
    take(seq_len, head_dim // 2)  # rotary tables, real and imaginary
    take(seq_len, head_dim // 2)
    if not tied:
        state["lm_head.weight"] = take(vocab, dim)
    assert position == len(values)
    out = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            "llama",
            vocab_size=vocab,
            hidden_size=dim,
            intermediate_size=hidden_dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=seq_len,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
        ),
        dtype=torch.float32,
    )
    missing, unexpected = out.load_state_dict(state, strict=False)
    assert not unexpected and all(name == "lm_head.weight" for name in missing), (missing, unexpected)
    out.tie_weights()
    out.save_pretrained(folder)
    return folder


def stories_decode(tokenizer: Path, tokens: list[int]) -> str:
    """The text of token ids by a llama2.c `tok*.bin` (SentencePiece pieces: length, score, bytes)."""
    raw = tokenizer.read_bytes()
    pieces, position = [], 4
    while position < len(raw):
        _, length = struct.unpack_from("<fi", raw, position)
        pieces.append(raw[position + 8 : position + 8 + length])
        position += 8 + length
    text = b""
    for before, token in zip([1, *tokens], tokens, strict=False):
        piece = pieces[token]
        if before == 1:  # after BOS, SentencePiece drops the leading space
            piece = piece.removeprefix(b" ")
        if len(piece) == 6 and piece.startswith(b"<0x"):
            piece = bytes([int(piece[3:5], 16)])
        text += piece
    return text.decode()


def write_gguf(path: Path, tokens: list[str], scores: list[float], kinds: list[int], **keys: Any) -> Path:
    """A Llama of one layer, 8 values wide, all weights zero, with a SentencePiece vocabulary."""
    keys = {"scores": scores, "token_type": kinds, **keys}
    return write_gguf_vocabulary(path, "llama", tokens, **keys)


def write_gguf_vocabulary(path: Path, model: str, tokens: list[str], **keys: Any) -> Path:
    """The same with any tokenizer: `keys` are those below `tokenizer.ggml.`."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    for name, value in keys.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value)
    tensors = {"token_embd": (len(tokens), 8), "output_norm": (8,)}
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        tensors[f"blk.0.{name}"] = (8, 8)
    for name in ("attn_norm", "ffn_norm"):
        tensors[f"blk.0.{name}"] = (8,)
    for name, shape in tensors.items():
        writer.add_tensor(f"{name}.weight", np.full(shape, float(len(shape) == 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
