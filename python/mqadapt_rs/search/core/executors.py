"""Executors of evaluations: this process, processes of this machine, or a Ray cluster.

In: the specification of an evaluator and work items. Out: losses in the order of the items, so that journals do not depend on the
executor. Every executor is a `concurrent.futures.Executor`; a worker builds its evaluator once and keeps it.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections import deque
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from mqadapt_rs.arguments import whole
from mqadapt_rs.errors import ArgumentError, MqadaptError
from mqadapt_rs.search.core.plan_record import counts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from mqadapt_rs.search.core.evaluation import Evaluator, EvaluatorSpec
    from mqadapt_rs.search.core.space import Layers

T = TypeVar("T")

MOST_WORKERS = 4096

_EVALUATORS: dict[EvaluatorSpec, Evaluator] = {}  # of this process


class WorkersDiedError(MqadaptError, BrokenExecutor):
    """The workers died repeatedly."""


@dataclass(frozen=True)
class Work:
    """Plans for one worker, and the layers before which it keeps hidden states for later plans."""

    plans: tuple[Layers, ...]
    branches: tuple[tuple[int, ...], ...]
    documents: tuple[int, int]


@dataclass(frozen=True)
class Outcome:
    """The losses and the seconds of each plan of a work item."""

    losses: tuple[tuple[float, ...], ...]
    seconds: tuple[float, ...]


def perform(spec: EvaluatorSpec, work: Work) -> Outcome:
    """Do a work item with the evaluator of this process."""
    evaluator = _EVALUATORS.get(spec)
    if evaluator is None:
        evaluator = _EVALUATORS[spec] = spec.build()
    start = time.perf_counter()
    answers = evaluator.losses(work.plans, work.branches, range(*work.documents))
    losses = [tuple(float(loss) for loss in answer) for answer in answers]
    for plan, found in zip(work.plans, losses, strict=False):
        if not all(map(math.isfinite, found)):
            raise MqadaptError(
                f"the plan with K/V heads {counts(plan)} has a loss that is infinite or not a number: the model's weights are "
                "damaged or its activations overflow; try --dtype float32, or 'mqadapt verify' on a converted model"
            )
    if len(losses) != len(work.plans):
        raise RuntimeError(f"the evaluator answered {len(losses)} of {len(work.plans)} plans")
    # plans of a group may share passes, so the time of the group is divided evenly
    each = (time.perf_counter() - start) / max(1, len(losses))
    return Outcome(tuple(losses), (each,) * len(losses))


def adopt(spec: EvaluatorSpec, evaluator: Evaluator) -> None:
    """Register an existing evaluator for this process."""
    _EVALUATORS[spec] = evaluator


def forget() -> None:
    """Release the evaluators of this process and their memory."""
    _EVALUATORS.clear()


class InProcess(Executor):
    """An executor that runs each call at once, in the calling thread."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Run `fn` and return its finished future."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as problem:  # noqa: BLE001 - raised by `result()`; Ctrl-C propagates
            future.set_exception(problem)
        return future


class RayExecutor(Executor):
    """Tasks on a Ray cluster.

    Ray's workers keep their process, so the evaluator stays loaded; a task whose worker or machine dies is run again
    elsewhere.
    """

    def __init__(self, address: str | None = None, num_cpus: float = 1.0) -> None:
        """Connect to a cluster; `address` as in Ray: `auto`, `ray://host:10001`; `None`: one on this machine."""
        try:
            import ray
        except ImportError:
            raise ArgumentError("--ray needs Ray: pip install 'mqadapt-rs[ray]'") from None
        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
        self._perform = ray.remote(max_retries=-1, num_cpus=num_cpus)(_call)
        self.slots = max(1, int(ray.cluster_resources().get("CPU", 1) // num_cpus))

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Submit a call to the cluster."""
        future: Future[T] = self._perform.remote(fn, args, kwargs).future()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002 - as the base
        """Disconnect from the cluster if this executor connected."""
        if self._started:
            self._ray.shutdown()


def _call(fn: Callable[..., T], args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
    return fn(*args, **kwargs)


@dataclass
class Pool:
    """An executor, which is recreated when its workers die."""

    make: Callable[[], Executor]
    slots: int
    """The number of work items that can run at once."""
    name: str
    _executor: Executor | None = None

    def stream(self, spec: EvaluatorSpec, works: Iterable[Work]) -> Iterator[tuple[Work, Outcome]]:
        """Do the work items; outcomes are yielded in the order of `works`.

        Raises:
            WorkersDiedError: the workers died three times in a row without a result.
        """
        waiting = deque(works)
        running: deque[tuple[Work, Future[Outcome]]] = deque()
        failures = 0
        try:
            while waiting or running:
                try:
                    while waiting and len(running) < self.slots + (
                        self.slots > 1
                    ):  # one more, so that no worker waits for this process
                        running.append((waiting[0], self._get().submit(perform, spec, waiting[0])))
                        waiting.popleft()
                    outcome = running[0][1].result()
                except BrokenExecutor as problem:
                    failures += 1
                    self.close()
                    if failures == 3:
                        raise WorkersDiedError(
                            f"the workers ({self.name}) died three times in a row, mostly because memory ran out: use "
                            f"fewer workers; the journal keeps all finished evaluations ({problem})"
                        ) from problem
                    waiting.extendleft(reversed([work for work, _ in running]))
                    running.clear()
                    continue
                failures = 0
                yield running.popleft()[0], outcome
        except BaseException:
            for _, future in running:
                future.cancel()
            raise

    def _get(self) -> Executor:
        if self._executor is None:
            self._executor = self.make()
        return self._executor

    def close(self) -> None:
        """Shut down the workers."""
        if self._executor is not None:
            with contextlib.suppress(Exception):
                self._executor.shutdown(wait=False, cancel_futures=True)
            self._executor = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def in_process() -> Pool:
    """A pool that evaluates in this process, one work item at a time."""
    return Pool(InProcess, 1, "in process")


def processes(workers: int) -> Pool:
    """A pool of processes on this machine."""
    import multiprocessing

    workers = whole("workers", workers, 1, MOST_WORKERS)
    context = multiprocessing.get_context("spawn")  # a fork would copy locked threads of the forward pass
    return Pool(
        lambda: ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent),
        workers,
        f"{workers} processes",
    )


def _end_with_parent() -> None:
    """End this worker when its parent process ends; without this, it would wait for work forever."""
    import multiprocessing
    from multiprocessing.connection import wait

    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        wait([parent.sentinel])  # the end of a pipe that the parent holds
        os._exit(1)  # a worker writes no files: the parent writes the journal

    threading.Thread(target=watch, name="mqadapt-parent", daemon=True).start()


def ray_cluster(address: str | None = None, num_cpus: float = 1.0) -> Pool:
    """A pool on a Ray cluster; `None` or an empty address starts one on this machine."""
    executor = RayExecutor(address or None, num_cpus)
    return Pool(lambda: executor, executor.slots, f"Ray ({address or 'local'})", executor)
