"""What converters do that go through a whole model: load all of it with PyTorch, build a second one, copy every tensor over,
save. Called by `convert.py`; the layers are those of a plan `mqa:alternateN`.

    python benches/peer_convert.py SRC DST mqa:alternate15
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def main(src: Path, dst: Path, plan: str) -> None:
    config = json.loads((src / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_key_value_heads"]
    count = int(plan.removeprefix("mqa:alternate"))
    chosen = {layers - 1 - 2 * i for i in range(count)}
    old: dict[str, torch.Tensor] = {}
    for path in sorted(src.glob("*.safetensors")):
        old |= load_file(path)
    # the second model: allocated and initialised before the old weights are copied into it
    new = {}
    for name, tensor in old.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        shape = list(tensor.shape)
        if layer in chosen and (".k_proj." in name or ".v_proj." in name):
            shape[0] //= heads
        new[name] = (
            torch.empty(shape, dtype=tensor.dtype).normal_(0, 0.02)
            if len(shape) == 2
            else torch.ones(shape, dtype=tensor.dtype)
        )
    with torch.no_grad():
        for name, tensor in old.items():
            if new[name].shape != tensor.shape:
                grouped = tensor.view(heads, -1, tensor.shape[1])
                new[name].copy_(grouped.float().mean(0).to(tensor.dtype))
            else:
                new[name].copy_(tensor)
    dst.mkdir()
    save_file(new, dst / "model.safetensors", metadata={"format": "pt"})
    (dst / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
