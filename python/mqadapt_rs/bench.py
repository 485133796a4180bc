"""Benchmark of plans on this machine.

In: a source and plans. Out: the throughput of prompts, the latency of decoded tokens at given depths, and the K/V bytes of each
plan. All plans are overlays of one loaded model, since the values of merged weights do not change the time. The plans take turns
in every round, and the fastest round counts: other programs only add time.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from mqadapt_rs._core import Model, Plan
from mqadapt_rs.arguments import whole
from mqadapt_rs.errors import ArgumentError

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    Progress = Callable[[str, int, int], object]


def bench(
    src: str | os.PathLike[str],
    plans: Sequence[str] = (),
    *,
    groups: Sequence[int] = (),
    depths: Sequence[int] = (64, 2048),
    prompts: Sequence[int] = (512,),
    steps: int = 32,
    rounds: int = 3,
    dtype: str | None = None,
    weights: str = "stored",
    kv: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model, and the same model under plans.

    Args:
        src: a folder, a `.gguf` file or a hub id.
        plans: plans as in `Plan.parse`; the source is always measured first.
        groups: numbers of K/V heads; each stands for the plan that gives all layers this number.
        depths: numbers of cached tokens when decoding begins.
        prompts: prompt lengths in tokens.
        steps: tokens decoded per round; the median counts.
        rounds: number of rounds; the fastest counts.
        dtype: dtype of the weights; by default as stored.
        weights: `stored` or `int8`, as `Model.load` takes it.
        kv: how the K/V cache of every plan is stored, as `Model.load` takes it.
        progress: called with the number of finished rounds.

    Returns:
        `plans`: name, `num_key_value_heads` of each layer, `kv_bytes_per_token`. `prefill`: for every plan and length
        `tokens_per_second`. `decode`: for every plan and depth `milliseconds_per_token`, `tokens_per_second`,
        `speedup` against the source, and `num_key_value_heads`, the mean over the layers.

    Raises:
        ArgumentError: a plan is illegal, or there is nothing to measure.
        MqadaptError, OSError: the model cannot be loaded.
    """
    steps, rounds = whole("steps", steps, 1), whole("rounds", rounds, 1)
    groups = [whole("groups", count, 1) for count in groups]
    depths = [whole("depths", depth, 0) for depth in depths]
    prompts = [whole("prompts", tokens, 1) for tokens in prompts]
    if not (depths or prompts):
        raise ArgumentError("nothing to measure: expected a depth or a prompt")
    names = ["keep", *plans, *(f"gqa{count}:all" if count > 1 else "mqa:all" for count in groups)]
    names = list(dict.fromkeys(names))
    parsed = [Plan.parse(name, src) for name in names]
    source = Model.load(src, dtype=dtype, weights=weights, kv=kv)
    if kv is not None:
        parsed = [plan.stored(kv) for plan in parsed]
    models = [source, *(source.with_plan(plan, "first") for plan in parsed[1:])]
    # one list of times per plan and measurement
    prefill: dict[tuple[int, int], list[float]] = {(i, n): [] for n in prompts for i in range(len(models))}
    decode: dict[tuple[int, int], list[float]] = {(i, n): [] for n in depths for i in range(len(models))}
    for round_ in range(rounds):
        for (index, tokens), times in prefill.items():
            times += models[index].measure_prefill(tokens, 1)
        for (index, depth), times in decode.items():
            times.append(statistics.median(models[index].measure_decode(depth, steps)))
        if progress is not None:
            progress("rounds", round_ + 1, rounds)
    return {
        "model": str(src),
        "dtype": source.dtype,
        "weights": weights,
        "kv": kv,
        "steps": steps,
        "rounds": rounds,
        "plans": [
            {
                "plan": name,
                "num_key_value_heads": model.config.num_key_value_heads,
                "kv_bytes_per_token": model.kv_bytes_per_token,
            }
            for name, model in zip(names, models, strict=True)
        ],
        "prefill": [
            {"plan": names[index], "tokens": tokens, "tokens_per_second": tokens / min(times)}
            for (index, tokens), times in prefill.items()
        ],
        "decode": [
            {
                "plan": names[index],
                "num_key_value_heads": statistics.mean(parsed[index].num_key_value_heads),
                "depth": depth,
                "milliseconds_per_token": 1e3 * min(times),
                "tokens_per_second": 1 / min(times),
                "speedup": min(decode[0, depth]) / min(times),
            }
            for (index, depth), times in decode.items()
        ],
    }
