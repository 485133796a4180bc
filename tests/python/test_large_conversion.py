"""Conversion of a checkpoint of some gigabytes: how soon Ctrl-C ends it, and how much memory it takes.

The source is a sparse file: it has its length, and takes no room.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

HIDDEN, INTERMEDIATE, VOCAB = 2048, 5632, 4096
COMMAND = [sys.executable, "-m", "mqadapt_rs.cli"]


def sparse(folder: Path, layers: int) -> Path:
    """A Llama whose weights are all zero; 103 MB a layer."""
    shapes = {"lm_head.weight": (VOCAB, HIDDEN), "model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        shapes |= {f"{name}.mlp.{p}_proj.weight": (INTERMEDIATE, HIDDEN) for p in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes |= {f"{name}.{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
    shapes["model.norm.weight"] = (HIDDEN,)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def wait_for(path: Path, size: int, process: subprocess.Popen[str]) -> None:
    while not path.exists() or path.stat().st_blocks * 512 < size:
        assert process.poll() is None, "it was over before it could be stopped"
        time.sleep(0.005)


# a durable conversion has to wait for what is on its way to the disk before its file can be removed: as fast as the disk is
@pytest.mark.parametrize("options", [["--no-sync"], ["--dtype", "f16", "--no-sync"]])
def test_ctrl_c_ends_it_within_a_fifth_of_a_second(tmp_path: Path, options: list[str]) -> None:
    source = sparse(tmp_path / "source", layers=60)
    seconds = []
    while not seconds or (min(seconds) > 0.2 and len(seconds) < 8):  # the machines that run tests are shared
        command = [*COMMAND, "convert", str(source), str(tmp_path / "out"), "--plan", "mqa:all", *options]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wait_for(tmp_path / "out.mqadapt-partial" / "model.safetensors.partial", 500 << 20, process)
        begun = time.perf_counter()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        seconds.append(time.perf_counter() - begun)
        assert process.returncode == 130, errors
        assert "Traceback" not in errors
        assert os.listdir(tmp_path) == ["source"]  # noqa: PTH208
    assert min(seconds) <= 0.2, seconds


# a child's peak is at least what its parent had when it was made: so the parent is a small process
MEASURE = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def peak_rss(*arguments: str) -> int:
    """Bytes of a whole `mqadapt` process."""
    return int(subprocess.check_output([sys.executable, "-c", MEASURE, *COMMAND, *arguments]))


def test_memory_does_not_depend_on_the_model(tmp_path: Path) -> None:
    base = peak_rss("--version")
    above = []
    for layers in (3, 20):
        source = sparse(tmp_path / f"source{layers}", layers)
        out = tmp_path / f"out{layers}"
        above.append(peak_rss("convert", str(source), str(out), "--plan", "mqa:all", "--no-sync") - base)
        (out / "model.safetensors").unlink()
    small, large = above
    assert large < 96 << 20
    assert abs(large - small) <= 0.1 * small, above
