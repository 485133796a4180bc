"""The forward pass on an NVIDIA GPU beside PyTorch's (transformers), in one process, taking turns.

    python benches/cuda.py FOLDER [--plans keep mqa:all] [--depths 64 2048 8192] [--repeat 3] [--json]
    python benches/cuda.py FOLDER --random llama-1b

In: a folder in Hugging Face layout; `--random` writes one of random bfloat16 weights there first, of a model's shape. Out: for
every kind of work the median time of each engine in milliseconds, and the K/V bytes of a token. Needs a build with the cargo
feature `cuda`, PyTorch with CUDA, and transformers. Heads are merged by `mean`: weights do not change times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mqadapt_rs

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 16  # decode steps of a run
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False},
}  # fmt: skip


def write_random(folder: Path, shape: str) -> None:
    """A Llama of random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", max_position_embeddings=131072, rope_theta=500000.0, **SHAPES[shape])
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


class Ours:
    """This package under a plan."""

    def __init__(self, folder: Path, plan: str, device: str) -> None:
        """Loads the model; its name is that of the plan."""
        self.name = f"ours {plan}"
        self.model = mqadapt_rs.Model.load(
            folder, plan=plan, method="mean", dtype="bfloat16", device=device, max_tokens_in_flight=8192
        )

    def prefill(self, tokens: int) -> float:
        """Seconds."""
        return self.model.measure_prefill(tokens, 1)[0]

    def decode(self, depth: int) -> float:
        """Seconds of a step."""
        return statistics.median(self.model.measure_decode(depth, STEPS))


class Transformers:
    """PyTorch's scaled dot-product attention, and a cache that grows."""

    name = "transformers"

    def __init__(self, folder: Path, device: str) -> None:
        """Loads the model."""
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.device = torch, device
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="sdpa")
        self.model = model.eval().to(device)

    def _timed(self, work: Callable[[], Any]) -> tuple[float, Any]:
        self.torch.cuda.synchronize()
        begun = time.perf_counter()
        with self.torch.inference_mode():
            out = work()
        self.torch.cuda.synchronize()
        return time.perf_counter() - begun, out

    def _ids(self, tokens: int) -> Any:
        return self.torch.arange(tokens, device=self.device)[None] % 1000

    def prefill(self, tokens: int) -> float:
        """Seconds."""
        return self._timed(lambda: self.model(self._ids(tokens), logits_to_keep=1))[0]

    def decode(self, depth: int) -> float:
        """Seconds of a step."""
        _, out = self._timed(lambda: self.model(self._ids(depth), use_cache=True, logits_to_keep=1))
        times = []
        for _ in range(STEPS):
            token, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            seconds, out = self._timed(
                lambda token=token, cache=cache: self.model(token, past_key_values=cache, use_cache=True)
            )
            times.append(seconds)
        return statistics.median(times)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--random", choices=SHAPES)
    parser.add_argument("--plans", nargs="+", default=["keep", "mqa:all"])
    parser.add_argument("--prompts", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--depths", nargs="+", type=int, default=[64, 2048, 8192])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.random and not (arguments.folder / "config.json").exists():
        write_random(arguments.folder, arguments.random)
    engines: list[Ours | Transformers] = [Ours(arguments.folder, plan, arguments.device) for plan in arguments.plans]
    engines.append(Transformers(arguments.folder, arguments.device))
    work = [("prefill", tokens) for tokens in arguments.prompts] + [("decode", depth) for depth in arguments.depths]
    rows = []
    for name, size in work:
        times: dict[str, list[float]] = {engine.name: [] for engine in engines}
        for nth in range(arguments.repeat + 1):
            for engine in engines:
                seconds = getattr(engine, name)(size)
                if nth:  # the first run compiles and allocates
                    times[engine.name].append(1e3 * seconds)
        rows.append({"work": f"{name} {size}", **{engine: statistics.median(own) for engine, own in times.items()}})
    bytes_per_token = {engine.name: engine.model.kv_bytes_per_token for engine in engines if isinstance(engine, Ours)}
    if arguments.json:
        print(json.dumps({"milliseconds": rows, "kv_bytes_per_token": bytes_per_token}, indent=1))
        return
    names = [engine.name for engine in engines]
    print(f"| ms | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for row in rows:
        print(f"| {row['work']} | {' | '.join(f'{row[name]:.2f}' for name in names)} |")
    print(f"K/V bytes per token: {bytes_per_token}")


if __name__ == "__main__":
    main()
