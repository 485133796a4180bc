"""Checkpoints to measure with: Llama-shaped, as many K/V heads as query heads, random weights.

`make` writes bf16 safetensors (normally distributed values, in shards), `make_gguf` the same model as one GGUF file with
matrices in Q4_0 (random blocks).
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from pathlib import Path

VOCAB_SIZE = 32000


class Shape(NamedTuple):
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    shards: int


# by the gigabytes of the bf16 checkpoint
SHAPES = {
    "0.3": Shape(768, 2048, 14, 12, 1),
    "3.4": Shape(2048, 5632, 30, 16, 2),
    "13": Shape(4096, 11008, 32, 32, 3),
}


def make(folder: Path, size: str) -> None:
    """Writes the safetensors checkpoint."""
    import numpy as np  # not above: who imports this module measures, and a child process begins with its parent's memory

    shape = SHAPES[size]
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"model.embed_tokens.weight": (VOCAB_SIZE, hidden), "lm_head.weight": (VOCAB_SIZE, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for layer in range(shape.num_hidden_layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{name}.mlp.{p}_proj.weight": (intermediate, hidden) for p in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes |= {f"{name}.{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    values = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32) * np.float32(0.02)
    pool = (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    names = sorted(shapes)
    weight_map = {}
    for shard in range(shape.shards):
        own = names[shard * len(names) // shape.shards : (shard + 1) * len(names) // shape.shards]
        file = "model.safetensors" if shape.shards == 1 else f"model-{shard + 1:05}-of-{shape.shards:05}.safetensors"
        weight_map |= dict.fromkeys(own, file)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in own:
            start, end = end, end + 2 * int(np.prod(shapes[name]))
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(text)) + text)
            while end > 0:
                out.write(pool[: min(end, len(pool))])
                end -= len(pool)
    if shape.shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_attention_heads,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))


def make_gguf(path: Path, size: str) -> None:
    """Writes the GGUF file: matrices in Q4_0, norms in F32, no tokenizer."""
    import numpy as np  # as in `make`

    shape = SHAPES[size]
    hidden, intermediate = shape.hidden_size, shape.intermediate_size
    pairs = [
        _text("general.architecture", "llama"),
        *(
            _number(f"llama.{name}", value)
            for name, value in {
                "block_count": shape.num_hidden_layers,
                "context_length": 4096,
                "embedding_length": hidden,
                "feed_forward_length": intermediate,
                "attention.head_count": shape.num_attention_heads,
            }.items()
        ),
        _key("llama.attention.layer_norm_rms_epsilon") + struct.pack("<If", 6, 1e-5),
    ]
    shapes = {"token_embd": (VOCAB_SIZE, hidden), "output": (VOCAB_SIZE, hidden), "output_norm": (hidden,)}
    for layer in range(shape.num_hidden_layers):
        shapes |= {f"blk.{layer}.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.ffn_{name}": (intermediate, hidden) for name in ("gate", "up")}
        shapes[f"blk.{layer}.ffn_down"] = (hidden, intermediate)
        shapes |= {f"blk.{layer}.{name}_norm": (hidden,) for name in ("attn", "ffn")}
    infos, lengths, offset = [], [], 0
    for name, own in shapes.items():
        kind, length = (2, int(np.prod(own)) // 32 * 18) if len(own) == 2 else (0, own[0] * 4)
        dimensions = struct.pack(f"<I{len(own)}Q", len(own), *reversed(own))
        infos.append(_key(f"{name}.weight") + dimensions + struct.pack("<IQ", kind, offset))
        lengths.append((kind, length))
        offset += length + -length % 32
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (1 << 20, 18), dtype=np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.005).tobytes(), np.uint8)  # the scale
    pool, ones = blocks.tobytes(), np.ones(hidden, np.float32).tobytes()
    with path.open("wb") as out:
        out.write(b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(pairs)) + b"".join(pairs) + b"".join(infos))
        out.write(b"\0" * (-out.tell() % 32))
        for kind, length in lengths:
            left, source = length, pool if kind == 2 else ones
            while left > 0:
                out.write(source[:left])
                left -= len(source)
            out.write(b"\0" * (-length % 32))


def _key(name: str) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode()


def _text(name: str, value: str) -> bytes:
    return _key(name) + struct.pack("<I", 8) + _key(value)


def _number(name: str, value: int) -> bytes:
    return _key(name) + struct.pack("<II", 4, value)
