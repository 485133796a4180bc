"""Seconds and memory of merging one layer by `closed-form`, for the shape of a model: a synthetic checkpoint of a single layer.

    python benches/merge_layer.py smollm2-135m llama-3-8b --plan mqa:all

Statistics are of 16384 random tokens in windows of 2048; the merge has joint values and a cut measured at 512 and 2048.
Weights are normally distributed: times hardly depend on them.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import resource
import struct
import tempfile
import time
from pathlib import Path

# hidden_size, intermediate_size, num_attention_heads, num_key_value_heads, head_dim
SHAPES = {
    "smollm2-135m": (576, 1536, 9, 3, 64),
    "llama-3-8b": (4096, 14336, 32, 8, 128),
    "llama-2-7b": (4096, 11008, 32, 32, 128),
    "synthetic-3.4": (2048, 5632, 16, 16, 128),
}
VOCAB_SIZE = 1024


def make(folder: Path, shape: str) -> None:
    """Writes the checkpoint, bf16, one tensor after the other."""
    import numpy as np

    hidden, intermediate, heads, kv_heads, d = SHAPES[shape]
    layer = "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB_SIZE, hidden),
        "model.norm.weight": (hidden,),
    }
    for name, rows in (("q", heads * d), ("k", kv_heads * d), ("v", kv_heads * d)):
        shapes[f"{layer}.self_attn.{name}_proj.weight"] = (rows, hidden)
    shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, heads * d)
    shapes |= {f"{layer}.mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
    shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, intermediate)
    shapes |= {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, of in shapes.items():
        end = at + 2 * math.prod(of)
        header[name] = {"dtype": "BF16", "shape": of, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for of in shapes.values():
            values = np.ones(of, dtype=np.float32)
            if len(of) == 2:
                values = generator.standard_normal(of, dtype=np.float32) * np.float32(hidden**-0.5)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": d,
        "vocab_size": VOCAB_SIZE,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "rope_theta": 100000.0,
    }
    (folder / "config.json").write_text(json.dumps(config))


def run(folder: Path, arguments: argparse.Namespace) -> None:
    """Collects and merges in this process, and says what it took."""
    from mqadapt_rs import Calibration, convert

    ids = random.Random(0).choices(range(VOCAB_SIZE), k=arguments.tokens)
    windows = [ids[at : at + 2048] for at in range(0, len(ids), 2048)]
    stats = folder / "stats"
    begun = time.perf_counter()
    # prune needs the statistics and next to nothing else
    pruned = Calibration(windows, stats=stats)
    convert(folder, folder / "pruned", arguments.plan, "prune", calibration=pruned, sync=False)
    collected = time.perf_counter() - begun
    saved = Calibration(windows, stats=stats, sequential=arguments.sequential, refine=arguments.refine)
    begun = time.perf_counter()
    convert(folder, folder / "merged", arguments.plan, "closed-form", calibration=saved, sync=False)
    merged = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"statistics {collected:.1f} s, merge {merged:.1f} s, peak {peak:.0f} MiB", flush=True)


def main() -> None:
    """Makes a checkpoint of each shape, and merges it; both in processes of their own, so that peaks are its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="+", choices=list(SHAPES))
    parser.add_argument("--plan", default="mqa:all")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--sequential", action="store_true", help="refit o_proj too")
    parser.add_argument("--refine", type=int, default=0)
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    for shape in arguments.shapes:
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
            print(f"{shape}: ", end="", flush=True)
            for work, given in ((make, shape), (run, arguments)):
                process = spawn.Process(target=work, args=(Path(name), given))
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
