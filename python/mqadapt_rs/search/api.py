"""`search()`: from a model and a question to a plan."""

from __future__ import annotations

import math
import shlex
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mqadapt_rs.arguments import LARGEST_SEED, real, whole
from mqadapt_rs.calibration import CONTEXT, lengths_of
from mqadapt_rs.errors import ArgumentError
from mqadapt_rs.search.core.executors import MOST_WORKERS, adopt, forget, in_process, processes, ray_cluster
from mqadapt_rs.search.core.journal import begun
from mqadapt_rs.search.core.limit import Limit
from mqadapt_rs.search.core.space import parse_budget
from mqadapt_rs.search.core.study import Options
from mqadapt_rs.search.evaluators import latency
from mqadapt_rs.search.evaluators.model_spec import CALIBRATED, METRICS, CalibrationData, Data, ModelSpec, space_of
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
    calibration_tokens: int = 16384,
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
    """Searches for the layers that can do with fewer K/V heads. No checkpoint is written: plans are tried in memory.

    Args:
        src: a folder, a `.gguf` file or a hub id.
        strategy: a key of `STRATEGIES`.
        out: the folder for journal, `best.plan.json` and `summary.json`.
        metric: `kl` (exact divergence from the source's next-token distribution), `perplexity`, `predicted` (from
            statistics of the calibration text, no forward pass), or `task:NAME/METRIC` of lm-eval.
        method: how heads are merged.
        calibration: text of the methods that merge from it, `closed-form` and `prune`: a file or a data set of the hub,
            as `load_calibration` takes it; also what plans are evaluated on where no `text` is given.
        calibration_field: the field of a `.jsonl` file that holds it.
        calibration_tokens: tokens drawn from it.
        calibration_context: tokens of a drawn window, one length or several.
        target_context: contexts that the converted model is for; by default as `load_calibration` has it.
        stats: file of the statistics; used where it exists, written where not (`out/statistics.safetensors`).
        sequential: refit of `closed-form`: every plan is merged anew, and none is stopped early, since merging takes longer
            than evaluating.
        refine: gradient steps on every merged layer before that; they imply `sequential`.
        text: for `kl` and `perplexity`: a file or a data set as `calibration`; best another one than that.
        field: the field of a `.jsonl` file that holds the text.
        context: tokens of a window.
        windows: the first windows of the text; `None`: all.
        include_path: a folder of own lm-eval tasks.
        limit: the first documents of the task; `None`: all.
        num_fewshot: examples in the prompt; the task's own by default.
        counts: K/V heads that layers may be reduced to.
        kv_budget: most K/V bytes per token: a share such as `"50%"`, or a number of bytes.
        latency_budget: most time of a decoded token, by times measured here: a share of the source's such as `"90%"`.
        depth: tokens in the cache when times are measured.
        max_damage: most damage.
        points: points of the Pareto front.
        swaps: neighbours that local search measures in a round.
        trials: random plans.
        plans: the plans that the strategy `given` measures.
        seed: of everything that is drawn by chance.
        error_rate: probability that early stopping of hopeless plans changes a winner; `None` stops nothing.
        dtype: of the weights; as stored by default.
        device: as `Model.load` takes it.
        weights: `stored`, or `int8` for speed; then the source has 8-bit weights too.
        max_memory: bytes of hidden states that are kept beside the model.
        workers: processes on this machine; in this process by default.
        ray: address of a Ray cluster; an empty text starts one on this machine.
        resume: go on with the journal in `out`.
        wandb: a Weights & Biases project.
        watcher: is told of every evaluation.

    Raises:
        ArgumentError: arguments that do not fit; `JournalError`, one of them, for a journal of another search.
        MqadaptError, OSError: the model cannot be read.
    """
    # a number of NumPy's would overflow later
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
        raise ArgumentError("--kv-budget and --latency-budget are two limits: choose one")
    if workers is not None and ray is not None:
        raise ArgumentError("--workers and --ray are two ways to the same: choose one")
    options = Options(
        counts=None if counts is None else tuple(sorted(set(counts))),
        # how much that is, the model will say
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
    if (sequential or refine) and (method != "closed-form" or metric == PREDICTED.name):
        what = f"the metric {metric}" if metric == PREDICTED.name else f"the method {method}"
        raise ArgumentError(f"{what} knows no refit: leave out --sequential and --refine")
    if (method in CALIBRATED or metric == PREDICTED.name) and calibration is None and stats is None:
        what = f"the method {method} merges" if method in CALIBRATED else "the metric predicted is computed"
        raise ArgumentError(f"{what} from statistics of a text: --calibration FILE or --stats FILE")
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
    if method in CALIBRATED or metric == PREDICTED.name:
        saved = Path(out) / "statistics.safetensors" if stats is None else Path(stats)
        drawn = CalibrationData(
            None if calibration is None else str(calibration),
            str(saved),
            calibration_field,
            calibration_tokens,
            calibration_lengths,
            None if target_context is None else tuple(target_context),
            sequential,
            refine,
        )
        spec = replace(spec, calibration=drawn)
        error_rate = None if drawn.refits else error_rate
    try:
        evaluator, model, spec = spec.load()
        model.with_plan("keep", method)  # an unknown method is refused before anything is measured
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
        del evaluator, model  # workers load their own
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
                about={
                    "source_argument": str(src),
                    "calibration_arguments": in_words(calibration_options(spec.calibration))
                    if spec.calibration
                    else "",
                    "command": command(src, strategy, Path(out), data, spec, budgets, options, space),
                },
            )
            if run is not None:
                run.result(result, _bytes_on_disk(src, result))
            return result
    finally:
        forget()


def layers_of(src: str | os.PathLike[str], plan: Plan | str | Sequence[int]) -> Layers:
    """What every layer of a model caches under a plan, in whatever form the plan is given."""
    from mqadapt_rs import ModelConfig, Plan

    return tuple(Plan.parse(plan, ModelConfig.load(src)).layers)


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
    """Of the winner's tensors, in the source's dtype."""
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
    """The command line that does this search."""
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
        **({} if calibration is None else calibration_options(calibration)),
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
    """Options as on the command line, a space before each; those with several values are repeated, switches have none."""
    words = ""
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                words += f" --{name}" if one is True else f" --{name} {shlex.quote(str(one))}"
    return words


def calibration_options(data: CalibrationData) -> dict[str, Any]:
    """The options of the command line that say so, where they are not the usual ones."""
    usual = CalibrationData(None, "")
    targets = None if data.target_context is None else ",".join(map(str, data.target_context))
    return {
        "calibration": data.file,
        "calibration-field": data.field if data.file and data.field != usual.field else None,
        "calibration-tokens": data.tokens if data.tokens != usual.tokens else None,
        "calibration-context": ",".join(map(str, data.context)) if data.context != usual.context else None,
        "target-context": targets,
        "stats": data.stats,
        "sequential": data.sequential or None,
        "refine": data.refine or None,
    }
