"""Conversion of a checkpoint of some gigabytes: what Ctrl-C leaves, and how much memory it takes.

The source is a sparse file: it has its length, and takes no room. What the closed form holds is seen on one small layer of
many heads, where the sums outweigh everything else.
"""

from __future__ import annotations

import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import pytest

HIDDEN, INTERMEDIATE, VOCAB = 2048, 5632, 4096
COMMAND = [sys.executable, "-m", "mqadapt_rs.cli"]


def sparse(folder: Path, layers: int, family: str = "llama") -> Path:
    """A model whose weights are all zero, in bfloat16; about 100 MB a layer."""
    shapes, config = {"llama": llama, "gpt2": gpt2, "gpt_neox": gpt_neox}[family](layers)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config |= {"model_type": family, "vocab_size": VOCAB, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


Model = tuple[dict[str, tuple[int, ...]], dict[str, object]]


def llama(layers: int) -> Model:
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (VOCAB, HIDDEN),
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
    }
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        shapes |= {f"{name}.mlp.{p}_proj.weight": (INTERMEDIATE, HIDDEN) for p in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"{name}.{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
    shapes["model.norm.weight"] = (HIDDEN,)
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers}
    return shapes, {
        **sizes,
        "architectures": ["LlamaForCausalLM"],
        "num_attention_heads": 16,
        "tie_word_embeddings": False,
    }


def gpt2(layers: int) -> Model:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (VOCAB, HIDDEN),
        "transformer.wpe.weight": (1024, HIDDEN),
    }
    for layer in range(layers):
        name = f"transformer.h.{layer}"
        matrices = {"attn.c_attn": 3 * HIDDEN, "attn.c_proj": HIDDEN, "mlp.c_fc": 4 * HIDDEN}
        shapes |= {f"{name}.{part}.weight": (HIDDEN, width) for part, width in matrices.items()}
        shapes |= {f"{name}.{part}.bias": (width,) for part, width in matrices.items()}
        shapes |= {f"{name}.mlp.c_proj.weight": (4 * HIDDEN, HIDDEN), f"{name}.mlp.c_proj.bias": (HIDDEN,)}
        shapes |= {f"{name}.ln_{nth}.{part}": (HIDDEN,) for nth in (1, 2) for part in ("weight", "bias")}
    shapes |= {f"transformer.ln_f.{part}": (HIDDEN,) for part in ("weight", "bias")}
    return shapes, {"architectures": ["GPT2LMHeadModel"], "n_embd": HIDDEN, "n_layer": layers, "n_head": 16}


def gpt_neox(layers: int) -> Model:
    shapes: dict[str, tuple[int, ...]] = {
        "embed_out.weight": (VOCAB, HIDDEN),
        "gpt_neox.embed_in.weight": (VOCAB, HIDDEN),
    }
    for layer in range(layers):
        name = f"gpt_neox.layers.{layer}"
        matrices = {
            "attention.query_key_value": (3 * HIDDEN, HIDDEN), "attention.dense": (HIDDEN, HIDDEN),
            "mlp.dense_h_to_4h": (4 * HIDDEN, HIDDEN), "mlp.dense_4h_to_h": (HIDDEN, 4 * HIDDEN),
        }  # fmt: skip
        shapes |= {f"{name}.{part}.weight": shape for part, shape in matrices.items()}
        shapes |= {f"{name}.{part}.bias": shape[:1] for part, shape in matrices.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"{name}.{norm}.{part}": (HIDDEN,) for norm in norms for part in ("weight", "bias")}
    shapes |= {f"gpt_neox.final_layer_norm.{part}": (HIDDEN,) for part in ("weight", "bias")}
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 4 * HIDDEN, "num_hidden_layers": layers}
    return shapes, {**sizes, "architectures": ["GPTNeoXForCausalLM"], "num_attention_heads": 16}


def written(file: BinaryIO) -> int:
    """Bytes that the file takes on its disk."""
    return os.fstat(file.fileno()).st_blocks * 512


def wait_for(path: Path, size: int, process: subprocess.Popen[str]) -> None:
    while not path.exists() or path.stat().st_blocks * 512 < size:
        assert process.poll() is None, "it was over before it could be stopped"
        time.sleep(0.005)


# Not a time but what is still written: a machine that runs tests is too uneven for fractions of a second.
@pytest.mark.parametrize("options", [["--no-sync"], ["--dtype", "f16", "--no-sync"]])
def test_after_ctrl_c_hardly_anything_is_written(tmp_path: Path, options: list[str]) -> None:
    source = sparse(tmp_path / "source", layers=60)
    command = [*COMMAND, "convert", str(source), str(tmp_path / "out"), "--plan", "mqa:all", *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / "out.mqadapt-partial" / "model.safetensors.partial"
    wait_for(partial, 500 << 20, process)
    with partial.open("rb") as file:  # held open, it tells what was written even after it is removed
        process.send_signal(signal.SIGINT)
        before = written(file)
        _, errors = process.communicate(timeout=30)
        after = written(file)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == ["source"]  # noqa: PTH208
    assert after < 5000 << 20, "it had run to its end"
    assert after - before <= 256 << 20, f"{(after - before) >> 20} MiB were written after Ctrl-C"


# a child's peak is at least what its parent had when it was made: so the parent is a small process
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def peak_rss(*arguments: str, command: list[str] = COMMAND) -> int:
    """Bytes of a whole process."""
    return int(subprocess.check_output([sys.executable, "-c", MEASURE, *command, *arguments]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_memory_does_not_depend_on_the_model(tmp_path: Path, family: str) -> None:
    base = peak_rss("--version")
    above = []
    for layers in (3, 20):
        source = sparse(tmp_path / f"source{layers}", layers, family)
        out = tmp_path / f"out{layers}"
        above.append(peak_rss("convert", str(source), str(out), "--plan", "mqa:all", "--no-sync") - base)
        (out / "model.safetensors").unlink()
    small, large = above
    assert large < 96 << 20
    assert abs(large - small) <= 0.1 * small, above


MANY_HEADS = 16
CLOSED_FORM = """
import random, sys
from mqadapt_rs import Calibration, convert
ids = random.Random(0).choices(range(512), k=1024)
calibration = Calibration([ids[:512], ids[512:]], target_context=[512], sequential="sequential" in sys.argv)
convert(sys.argv[1], sys.argv[2], "mqa:all", "closed-form", calibration=calibration, sync=False)
"""


def many_heads(folder: Path) -> Path:
    """A layer of 16 K/V heads of 64 dims."""
    import numpy as np
    from safetensors.numpy import save_file

    hidden, intermediate, width = 512, 1024, MANY_HEADS * 64
    layer = "model.layers.0"
    shapes = {"model.embed_tokens.weight": (512, hidden), f"{layer}.self_attn.o_proj.weight": (hidden, width)}
    shapes |= {f"{layer}.self_attn.{p}_proj.weight": (width, hidden) for p in "qkv"}
    shapes |= {f"{layer}.mlp.{p}_proj.weight": (intermediate, hidden) for p in ("gate", "up")}
    shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, intermediate)
    random = np.random.default_rng(0)
    tensors = {name: random.standard_normal(shape, dtype=np.float32) / 16 for name, shape in shapes.items()}
    norms = ("model.norm", f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm")
    tensors |= {f"{norm}.weight": np.ones(hidden, dtype=np.float32) for norm in norms}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": MANY_HEADS,
        "head_dim": 64,
        "vocab_size": 512,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("option", ["plain", "sequential"])
def test_closed_form_holds_little_besides_its_sums(tmp_path: Path, option: str) -> None:
    width = MANY_HEADS * 64
    sums = MANY_HEADS * 2 * 8 * width * (width + 1) // 2  # two triangles of f64 for every query head
    source = many_heads(tmp_path / "source")
    command = [sys.executable, "-c", CLOSED_FORM]
    base = peak_rss("--version")
    above = peak_rss(str(source), str(tmp_path / "out"), option, command=command) - base
    assert sums < above < 3 * sums, f"{above >> 20} MiB, {above / sums:.2f} of the sums"
