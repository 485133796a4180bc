"""What other forms of a K/V cache of integers would cost, simulated: forms that no cache here stores yet.

    python benches/kv_simulation.py SRC ../shared/data/text/wikitext2_raw_valid_documents.jsonl.gz --field page

In: a folder in Hugging Face layout of a model with full attention, and a text; 8192 tokens of its second half are measured. Every
form is put into transformers' attention, behind RoPE: keys by channel in blocks of 64 tokens (least and greatest value of each
channel as 16-bit floats, integers between them), values by token (Hadamard rotation, a 16-bit scale, the levels of least square
error of a normal distribution). A query reads what was computed of a token until `residual` tokens have followed the token's
block, and of the first four tokens always. `K4 V3 r64` is 4 bits, 3 bits, a residual of 64.
Out: for every form the share of the bytes of a bfloat16 cache at 8192 tokens, blocks that are not full and exempt tokens counted;
perplexity, and the mean divergence from the model as it is.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from merge_table import MEASURED_TOKENS, undo_wikitext
from transformers import AttentionInterface, AutoModelForCausalLM

from mqadapt_rs import text

BLOCK = 64  # tokens
SINKS = 4  # first tokens, always exact
DEPTH = 8192  # tokens at which bytes are counted
FORMS = ("K4 V4 r0", "K4 V4 r64", "K4 V3 r0", "K4 V3 r64", "K3 V2 r0", "K3 V2 r64", "K2 V2 r0", "K2 V2 r64")
CLIPS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6)


class Form(NamedTuple):
    """Bits of keys and of values, and tokens that a block stays exact behind its end."""

    key_bits: int
    value_bits: int
    residual: int

    @staticmethod
    def parse(name: str) -> Form:
        """Of `K4 V3 r64`."""
        key, value, residual = name.split()
        return Form(int(key[1:]), int(value[1:]), int(residual[1:]))

    def share(self, head_dim: int) -> float:
        """Of the bytes of a bfloat16 cache of `DEPTH` tokens."""
        bits = (self.key_bits + 32 / BLOCK + self.value_bits + 16 / head_dim) / 2
        exact = BLOCK / 2 + self.residual + SINKS
        return float((exact + (DEPTH - exact) * bits / 16) / DEPTH)


def lloyd_max(bits: int, device: str) -> torch.Tensor:
    """The levels of least square error for a normal distribution (Max 1960)."""
    grid = torch.linspace(-8, 8, 1 << 16, dtype=torch.float64)
    weight = torch.exp(-grid.square() / 2)
    levels = torch.linspace(-2, 2, 1 << bits, dtype=torch.float64)
    for _ in range(2000):
        nearest = torch.bucketize(grid, (levels[1:] + levels[:-1]) / 2)
        mass = torch.zeros_like(levels).index_add_(0, nearest, weight)
        levels = torch.zeros_like(levels).index_add_(0, nearest, weight * grid) / mass
    return levels.float().to(device)


def hadamard(size: int, device: str) -> torch.Tensor:
    """An orthonormal Walsh-Hadamard matrix."""
    out = torch.ones(1, 1)
    while len(out) < size:
        out = torch.cat([torch.cat([out, out], 1), torch.cat([out, -out], 1)])
    if len(out) != size:
        raise SystemExit(f"heads of {size} values are no power of two")
    return (out / math.sqrt(size)).to(device)


def half(x: torch.Tensor) -> torch.Tensor:
    """As a 16-bit float stores it."""
    return x.half().float()


def by_channel(x: torch.Tensor, bits: int) -> torch.Tensor:
    """`[.., tokens, head_dim]`: integers between the least and the greatest value of a channel in a block.

    With few bits both are drawn in where that lowers the error.
    """
    tokens = x.shape[-2]
    padded = torch.nn.functional.pad(x, (0, 0, 0, -tokens % BLOCK), mode="replicate") if tokens % BLOCK else x
    blocks = padded.unflatten(-2, (-1, BLOCK))
    least, most = blocks.amin(-2, keepdim=True), blocks.amax(-2, keepdim=True)
    out, error = blocks, torch.full_like(least, math.inf)
    for clip in CLIPS if bits < 4 else CLIPS[:1]:
        reach = clip * (most - least) / 2
        low = half((most + least) / 2 - reach)
        step = half(2 * reach / (2**bits - 1)).clamp(min=1e-7)
        found = ((blocks - low) / step).round().clamp(0, 2**bits - 1) * step + low
        own = (blocks - found).square().sum(-2, keepdim=True)
        out, error = torch.where(own < error, found, out), torch.minimum(own, error)
    return out.flatten(-3, -2)[..., :tokens, :]


class Simulation:
    """An attention function of transformers that stores keys and values in a form."""

    def __init__(self, form: Form | None, head_dim: int, device: str) -> None:
        """`None`: as they are."""
        self.form = form
        if form is not None:
            self.rotation, self.levels = hadamard(head_dim, device), lloyd_max(form.value_bits, device)

    def by_token(self, x: torch.Tensor) -> torch.Tensor:
        """Rotated rows, each a scale times levels, fitted to each other in three rounds."""
        x = x @ self.rotation
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        scale = x.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-20)
        for _ in range(3):
            rows = self.levels[torch.bucketize((x / scale).contiguous(), middles)]
            scale = ((x * rows).sum(-1, keepdim=True) / rows.square().sum(-1, keepdim=True)).clamp(min=6e-8)
        scale = half(scale).clamp(min=6e-8)
        return (self.levels[torch.bucketize((x / scale).contiguous(), middles)] * scale) @ self.rotation.T

    def __call__(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _mask: torch.Tensor | None,
        scaling: float,
        **_others: Any,
    ) -> tuple[torch.Tensor, None]:
        """`[sequences, heads, tokens, head_dim]` each."""
        groups = module.num_key_value_groups
        position = torch.arange(query.shape[-2], device=query.device)
        unseen = position[None] > position[:, None]

        def logits(keys: torch.Tensor) -> torch.Tensor:
            return query @ keys.repeat_interleave(groups, 1).transpose(-1, -2) * scaling

        if self.form is None:
            weights = logits(key).masked_fill(unseen, -math.inf).softmax(-1)
            return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None
        block_end = (position // BLOCK + 1) * BLOCK
        exact = (position[:, None] < block_end + self.form.residual) | (position < SINKS)
        scores = torch.where(exact, logits(key), logits(by_channel(key, self.form.key_bits)))
        weights = scores.masked_fill(unseen, -math.inf).softmax(-1)
        stored = self.by_token(value).repeat_interleave(groups, 1)
        out = (weights * exact) @ value.repeat_interleave(groups, 1) + (weights * ~exact) @ stored
        return out.transpose(1, 2).contiguous(), None


@torch.inference_mode()
def measured(model: Any, windows: torch.Tensor, source: list[torch.Tensor]) -> tuple[float, float]:
    """Perplexity, and the mean divergence from `source`: its log-probabilities, which a first call appends."""
    loss = divergence = 0.0
    first = not source
    for nth, ids in enumerate(windows):
        found = model(ids[None]).logits[0].float().log_softmax(-1)
        if first:
            source.append(found.cpu())
        reference = source[nth].to(found.device)
        loss -= float(found[:-1].gather(1, ids[1:, None]).sum())
        divergence += float((reference.exp() * (reference - found)).sum(-1).mean())
    return math.exp(loss / (windows.numel() - len(windows))), divergence / len(windows)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src")
    parser.add_argument("text", type=Path)
    parser.add_argument("--field", default="text")
    parser.add_argument("--forms", nargs="+", default=FORMS)
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    words = undo_wikitext("".join(text.read_documents(arguments.text, arguments.field)))
    ids = text.token_ids(text.load_tokenizer(arguments.src), words)
    tokens = torch.tensor(ids[len(ids) // 2 :][:MEASURED_TOKENS], device=arguments.device)
    model = AutoModelForCausalLM.from_pretrained(arguments.src, dtype=torch.float32).eval().to(arguments.device)
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    sources: dict[int, list[torch.Tensor]] = {context: [] for context in arguments.contexts}
    cells = [f"T = {context} | divergence" for context in arguments.contexts]
    print(f"| form | share of bytes | {' | '.join(cells)} |\n{'|---' * (2 + 2 * len(cells))}|")
    for name in (None, *arguments.forms):
        form = None if name is None else Form.parse(name)
        AttentionInterface.register("simulated", Simulation(form, head_dim, arguments.device))
        model.set_attn_implementation("simulated")
        row = []
        for context, source in sources.items():
            perplexity, divergence = measured(model, tokens.view(-1, context), source)
            row.append(f"{perplexity:.2f} | {divergence:.5f}")
        share = 1.0 if form is None else form.share(head_dim)
        print(f"| {name or 'as it is'} | {share:.1%} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
