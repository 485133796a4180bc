"""The function `search`. In: a model, a strategy and a metric. Out: evaluated plans and a winner."""

from __future__ import annotations

import math
import shlex
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mqadapt_rs import plan_settings
from mqadapt_rs._core import methods
from mqadapt_rs.arguments import LARGEST_SEED, real, whole
from mqadapt_rs.calibration import CONTEXT, TOKENS, CalibrationOptions, lengths_of
from mqadapt_rs.errors import ArgumentError
from mqadapt_rs.search.core.executors import MOST_WORKERS, adopt, forget, in_process, processes, ray_cluster
from mqadapt_rs.search.core.journal import begun
from mqadapt_rs.search.core.limit import Limit
from mqadapt_rs.search.core.options import Options
from mqadapt_rs.search.core.space import parse_budget
from mqadapt_rs.search.evaluators import latency
from mqadapt_rs.search.evaluators.data import Data
from mqadapt_rs.search.evaluators.model_spec import METRICS, ModelSpec, space_of
from mqadapt_rs.search.evaluators.predicted import METRIC as PREDICTED
from mqadapt_rs.search.runner import SearchResult, check, conduct, fits

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence

    from mqadapt_rs import Plan
    from mqadapt_rs.search.core.evaluation import Evaluation
    from mqadapt_rs.search.core.executors import Pool
    from mqadapt_rs.search.core.space import Layers, Space
    from mqadapt_rs.search.core.study import Watcher


def search(
    src: str | os.PathLike[str],
    *,
    strategy: str,
    out: str | os.PathLike[str],
    metric: str = "kl",
    method: str = "mean",
    calibration: str | os.PathLike[str] | None = None,
    calibration_field: str = "text",
    calibration_tokens: int = TOKENS,
    calibration_context: int | Sequence[int] = CONTEXT,
    target_context: Sequence[int] | None = None,
    stats: str | os.PathLike[str] | None = None,
    sequential: bool = False,
    refine: int = 0,
    text: str | os.PathLike[str] | None = None,
    field: str = "text",
    context: int = 512,
    windows: int | None = 16,
    include_path: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    counts: Sequence[int] | None = None,
    kv_budget: str | float | None = None,
    latency_budget: str | float | None = None,
    depth: int = 1024,
    max_damage: float | None = None,
    points: int | None = None,
    swaps: int | None = None,
    trials: int | None = None,
    plans: Sequence[Plan | str | Sequence[int]] | None = None,
    seed: int = 0,
    error_rate: float | None = 0.05,
    dtype: str | None = None,
    device: str = "cpu",
    weights: str = "stored",
    max_memory: int = 1 << 30,
    workers: int | None = None,
    ray: str | None = None,
    resume: bool = False,
    wandb: str | None = None,
    watcher: Watcher | None = None,
) -> SearchResult:
    """Search for the layers that can have fewer K/V heads. Plans are evaluated in memory; no checkpoint is written.

    Args:
        src: a folder, a `.gguf` file or a hub id.
        strategy: a key of `STRATEGIES`.
        out: folder for `journal.jsonl`, `best.plan.json` and `summary.json`.
        metric: `kl` (exact divergence from the next-token distribution of the source), `perplexity`, `predicted` (from
            statistics of the calibration text, no forward pass), or `task:NAME/METRIC` of lm-eval.
        method: merge method.
        calibration: calibration text of the methods that need one: a file or a data set of the hub, as in
            `load_calibration`; also the evaluation text if there is no `text`.
        calibration_field: name of the text field in a `.jsonl` file.
        calibration_tokens: number of drawn tokens.
        calibration_context: window lengths in tokens, one or several.
        target_context: context lengths that the converted model is optimised for; by default as in `load_calibration`.
        stats: statistics file; read if it exists and written if not. By default `out/statistics.safetensors`.
        sequential: refit layer by layer. Every plan is then merged separately, and none is stopped early, since merging
            takes longer than evaluating.
        refine: number of gradient steps on every merged layer before the refit; they imply `sequential`.
        text: evaluation text of `kl` and `perplexity`: a file or a data set, which should differ from `calibration`.
        field: name of the text field in a `.jsonl` file.
        context: tokens per window.
        windows: number of windows, from the beginning of the text; `None`: all.
        include_path: a folder with custom lm-eval tasks.
        limit: number of documents, from the beginning of the task; `None`: all.
        num_fewshot: number of examples in the prompt; by default that of the task.
        counts: numbers of K/V heads that layers may be reduced to.
        kv_budget: limit of K/V bytes per token: a share such as `"50%"`, or a number of bytes. Bytes are those of the dtype
            in which the model computes its K/V cache, as in `Model.kv_bytes_per_token`.
        latency_budget: limit of the latency of a decoded token, measured on this machine: a share of that of the source,
            such as `"90%"`.
        depth: number of cached tokens at which latency is measured.
        max_damage: limit of the damage.
        points: number of points of the Pareto front.
        swaps: number of neighbours that local search evaluates per round.
        trials: number of random plans.
        plans: the plans that the strategy `given` evaluates.
        seed: seed of the random number generators.
        error_rate: probability that early stopping changes a winner; `None` disables early stopping.
        dtype: dtype of the weights; by default as stored.
        device: as in `Model.load`.
        weights: `stored`, or `int8` for speed; the source then has 8-bit weights, too.
        max_memory: bytes of hidden states that are kept in memory.
        workers: number of worker processes; by default the plans are evaluated in this process.
        ray: address of a Ray cluster; an empty string starts one on this machine.
        resume: resume the search whose journal is in `out`.
        wandb: a Weights & Biases project.
        watcher: called after every evaluation.

    Raises:
        ArgumentError: the strategy or an option is invalid; `JournalError`, a subclass, if the journal is of another search.
        MqadaptError, OSError: the model cannot be read.
    """
    # converted here, since a NumPy integer would overflow later
    context, depth, refine = whole("context", context, 2), whole("depth", depth, 1), whole("refine", refine)
    windows, limit = whole("windows", windows, 1), whole("limit", limit, 1)
    num_fewshot, points = whole("num_fewshot", num_fewshot), whole("points", points, 1)
    swaps, trials = whole("swaps", swaps), whole("trials", trials, 1)
    calibration_tokens = whole("calibration_tokens", calibration_tokens, 1)
    calibration_lengths = tuple(lengths_of(calibration_context))
    if target_context is not None:
        target_context = [whole("target_context", one, 1) for one in target_context]
    max_memory, seed = whole("max_memory", max_memory, 1), whole("seed", seed, 0, LARGEST_SEED)
    workers = whole("workers", workers, 1, MOST_WORKERS)
    if counts is not None:
        counts = [whole("counts", count, 1) for count in counts]
    if max_damage is not None:
        max_damage = real("max_damage", max_damage, -math.inf)
    if error_rate is not None:
        error_rate = real("error_rate", error_rate, 0.0, 0.5)
    if kv_budget is not None and latency_budget is not None:
        raise ArgumentError("--kv-budget and --latency-budget are two limits; choose one")
    if workers is not None and ray is not None:
        raise ArgumentError("--workers and --ray exclude each other; choose one")
    options = Options(
        counts=None if counts is None else tuple(sorted(set(counts))),
        # the amount depends on the model, which is loaded later
        kv_budget=None if kv_budget is None else math.inf,
        latency_budget=None if latency_budget is None else math.inf,
        max_damage=max_damage,
        points=points,
        swaps=swaps,
        trials=trials,
        plans=None if plans is None else (),
    )
    check(strategy, options)
    begun(Path(out), resume=resume)
    # an unknown method is refused when the model is loaded
    known = next((one for one in methods() if one.name == method), None)
    needs_calibration = metric == PREDICTED.name or (known is not None and known.needs_calibration)
    refits = {name for name, given in (("sequential", sequential), ("refine", refine)) if given}
    if refits and (metric == PREDICTED.name or known is None or not refits <= set(known.options)):
        what = f"the metric {metric}" if metric == PREDICTED.name else f"the method {method}"
        raise ArgumentError(f"{what} has no refit: remove --sequential and --refine")
    if needs_calibration and calibration is None and stats is None:
        what = f"the method {method}" if metric != PREDICTED.name else f"the metric {metric}"
        raise ArgumentError(f"{what} needs calibration text or statistics: --calibration FILE or --stats FILE")
    if text is None and metric in METRICS:
        text, field = calibration, calibration_field
    data = Data(
        text=None if text is None else str(text),
        field=field,
        context=context,
        windows=windows,
        include_path=None if include_path is None else str(include_path),
        limit=limit,
        num_fewshot=num_fewshot,
    )
    spec = ModelSpec(str(src), metric, data, method, seed, dtype, device, weights, max_memory)
    if needs_calibration:
        drawn = CalibrationOptions(
            None if calibration is None else str(calibration),
            calibration_field,
            calibration_tokens,
            calibration_lengths,
            None if target_context is None else tuple(target_context),
            str(Path(out) / "statistics.safetensors" if stats is None else stats),
            sequential,
            refine,
        )
        spec = replace(spec, calibration=drawn)
        error_rate = None if drawn.refits else error_rate
    try:
        evaluator, model, spec = spec.load()
        model.with_plan("keep", method)  # refuses an unknown method before anything is measured
        space = space_of(model, options.counts)
        if plans is not None:
            options = replace(options, plans=tuple(layers_of(src, plan) for plan in plans))
        if kv_budget is not None:
            options = replace(options, kv_budget=parse_budget(kv_budget, space.kv_bytes(space.source)))
        if latency_budget is not None:
            space = latency.measured(Path(out), model, space, depth, resume=resume)
            source = Limit(space, math.inf, latency=True).cost(space.source)
            options = replace(options, latency_budget=parse_budget(latency_budget, source, "seconds"))
        fits(strategy, options, space)
        spec.try_out(evaluator, space)
        if latency_budget is not None:
            latency.save(Path(out), space, depth)
        if workers is None and ray is None:
            adopt(spec, evaluator)
        del evaluator, model  # workers load their own model
        budgets = {"kv-budget": kv_budget, "latency-budget": latency_budget, "depth": depth if latency_budget else None}
        with ExitStack() as stack:
            pool: Pool = stack.enter_context(_pool(workers, ray))
            run = stack.enter_context(_run(wandb, strategy, spec, Path(out)))

            def watch(
                evaluation: Evaluation, done: int, expected: int, best: Evaluation | None, seconds_left: float
            ) -> None:
                if watcher is not None:
                    watcher(evaluation, done, expected, best, seconds_left)
                if run is not None:
                    run.evaluation(evaluation, metric)

            result = conduct(
                spec,
                space,
                strategy,
                options,
                Path(out),
                pool=pool,
                seed=seed,
                resume=resume,
                error_rate=error_rate,
                watcher=watch,
                merge=plan_settings.fields(spec.method, spec.seed, spec.calibration, Path(out)),
                about={
                    "source_argument": str(src),
                    "calibration_arguments": in_words(spec.calibration.command_line()) if spec.calibration else "",
                    "command": command(src, strategy, Path(out), data, spec, budgets, options, space),
                },
            )
            if run is not None:
                run.result(result, _bytes_on_disk(src, result))
            return result
    finally:
        forget()


def layers_of(src: str | os.PathLike[str], plan: Plan | str | Sequence[int]) -> Layers:
    """What every layer of a model caches under a plan in any form.

    Raises:
        ArgumentError: the plan is illegal, or says how caches are stored, which the files of a search do not hold.
    """
    from mqadapt_rs import ModelConfig, Plan

    parsed = Plan.parse(plan, ModelConfig.load(src))
    stored = next((storage for storage in parsed.storage if storage != "computed"), None)
    if stored is not None:
        raise ArgumentError(
            f"the plan {parsed.describe()!r} says how K/V caches are stored, but a search compares numbers of K/V heads: leave "
            f"'@{stored}' out"
        )
    return tuple(parsed.layers)


def _pool(workers: int | None, ray: str | None) -> Pool:
    if ray is not None:
        return ray_cluster(ray)
    return in_process() if workers is None else processes(workers)


def _run(wandb: str | None, strategy: str, spec: ModelSpec, folder: Path) -> Any:
    from mqadapt_rs.tracking import tracked

    config = {**spec.fingerprints(), "strategy": strategy, "metric": spec.metric_name, "seed": spec.seed}
    if wandb is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return tracked(wandb, name=f"{strategy} {spec.method}", config=config, folder=folder)


def _bytes_on_disk(src: str | os.PathLike[str], result: SearchResult) -> int | None:
    """Bytes of the tensors of the winner, in the dtype of the source."""
    from mqadapt_rs import ModelConfig, inspect
    from mqadapt_rs.tracking import VALUE_BYTES

    if result.plan is None:
        return None
    return result.plan.parameters(ModelConfig.load(src)) * VALUE_BYTES[str(inspect(src)["dtype"])]


def command(
    src: str | os.PathLike[str],
    strategy: str,
    out: Path,
    data: Data,
    spec: ModelSpec,
    budgets: dict[str, str | float | None],
    options: Options,
    space: Space,
) -> str:
    """The command line that reproduces this search."""
    words = [
        "mqadapt",
        "search",
        str(src),
        "--strategy",
        strategy,
        "--metric",
        spec.metric_name,
        "--method",
        spec.method,
    ]
    defaults = Data()
    calibration = spec.calibration
    given: dict[str, Any] = {
        **({} if calibration is None else calibration.command_line()),
        "text": data.text,
        "field": data.field if data.text and data.field != defaults.field else None,
        "context": data.context if data.text else None,
        "windows": data.windows if data.text else None,
        "include-path": data.include_path,
        "limit": data.limit,
        "num-fewshot": data.num_fewshot,
        "counts": None if options.counts is None else ",".join(map(str, options.counts)),
        **budgets,
        "max-damage": options.max_damage,
        "points": options.points,
        "swaps": options.swaps,
        "trials": options.trials,
        "plan": [space.describe(plan) for plan in options.plans or ()],
        "seed": spec.seed or None,
        "dtype": spec.dtype,
        "device": spec.device if spec.device != "cpu" else None,
        "weights": spec.weights if spec.weights != "stored" else None,
        "out": out,
    }
    return shlex.join(words) + in_words(given)


def in_words(options: dict[str, Any]) -> str:
    """Format options as on a command line, each after a space; options with several values are repeated."""
    words = ""
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                words += f" --{name}" if one is True else f" --{name} {shlex.quote(str(one))}"
    return words
