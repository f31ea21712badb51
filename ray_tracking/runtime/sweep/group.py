"""A trial of several workers: a run of Ray Train inside Ray Tune's process for the trial.

In: the trial's task. Out: results told to Ray Tune from this process's own thread, as rank 0 brings them through the
hub; and an end of the workers in order, however the trial ends: Ray Tune knows nothing of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.exceptions import RayError, RayTaskError
from ray.train._internal.session import get_session
from ray.train.v2._internal.constants import get_env_vars_to_propagate
from ray.train.v2._internal.execution.controller import TrainController
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_tracking.errors import RunFailedError
from ray_tracking.log import get_logger
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore
from ray_tracking.runtime import cluster  # noqa: F401 - sets how Ray Train behaves
from ray_tracking.runtime.context import Run
from ray_tracking.runtime.failures import is_hopeless
from ray_tracking.runtime.interrupts import InterruptibleTrainer
from ray_tracking.runtime.launching import Outcome, train_on_ray
from ray_tracking.runtime.nearby import forget_nearby
from ray_tracking.runtime.stopping import STOPPED
from ray_tracking.runtime.sweep.mailbox import FIRST, Answer, Number
from ray_tracking.runtime.sweep.reporting import Result
from ray_tracking.runtime.worker import WorkerTask
from ray_tracking.storage import Storage

log = get_logger()

_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 20.0
_WRITING_SECONDS = 15.0
"""How long an ending trial waits for what rank 0 is saving."""
_KILLED_SECONDS = 20.0


class TrialGivenUpError(RunFailedError):
    """The workers failed more often than the configuration allows: no other try of the whole trial."""


class ToHub:
    """On rank 0: brings a result to the hub and waits for what Ray Tune says. Can be pickled."""

    def __init__(self, hub: Any, run_id: str) -> None:
        self._hub = hub
        self._run_id = run_id
        self._count = 0

    def __call__(self, result: Result, run: Run) -> None:
        self._count += 1
        number = run.attempt, self._count
        answer = None
        with run.standing_still():
            while answer is None:
                answer = ray.get(self._hub.report.remote(self._run_id, number, result, _ANSWER_SECONDS))
            if answer == Answer.END:
                run.checkpoints.finish_writing()
                ray.get(self._hub.reports_ended.remote(self._run_id))
                time.sleep(_KILLED_SECONDS)  # the other ranks wait for this one: all are ended from outside
                raise SystemExit(0)


class NestedTrainer(InterruptibleTrainer):
    """Started from a thread that is not the main one: there Ray Train keeps no controller that could be aborted."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._aborted = threading.Event()

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        here = ray.get_runtime_context().get_node_id()
        environment = {**get_env_vars_to_propagate(), RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: "0"}
        remote: Any = ray.remote
        kind = remote(
            num_cpus=0,
            runtime_env={"env_vars": environment},
            # Named, so that it is not put into the placement group of Ray Tune's process for the trial.
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )(TrainController)
        self._controller = kind.remote(**{**arguments, "failure_policy": self.restarts})
        if self._aborted.is_set():
            ray.kill(self._controller)
        ray.get(self._controller.run.remote())
        return ray.get(self._controller.get_result.remote())

    def abort(self) -> None:
        self._aborted.set()
        super().abort()
        if self._controller is not None:
            ray.kill(self._controller)  # if it did not answer in time


class _Control:
    """Stands for the run's owner, which in a sweep is the hub: `train_on_ray` says here how training is aborted."""

    def __init__(self) -> None:
        self.abort: Callable[[], object] = lambda: None

    @contextmanager
    def aborting(self, abort: Callable[[], object]) -> Iterator[None]:
        self.abort = abort
        yield


def run_group(hub: Any, task: WorkerTask, directory: Storage, tell: Callable[[Result], None]) -> str | None:
    """Train to the end; returns STOPPED if somebody asked the run to stop. Raises what the workers failed of.

    SystemExit, when Ray Tune ends the trial, is raised once the workers are gone.
    """
    stop: threading.Event = get_session().stop_event  # type: ignore[union-attr]
    control = _Control()
    found: list[Outcome] = []
    record = RunStore(Storage.open(task.storage)).load(task.run_id)
    attempt = record.attempts[-1].number + 1 if record.attempts else 1

    def fit() -> None:
        found.append(train_on_ray(task, directory, attempt, control, NestedTrainer))

    training = threading.Thread(target=fit, name="ray-tracking-group", daemon=True)
    training.start()
    seen = FIRST
    try:
        while True:
            over = not training.is_alive()  # before looking: then nothing comes after it
            report = _next(hub, task.run_id, seen, 0.0 if over else _LOOK_SECONDS)
            if report is not None:
                seen = report[0]
                tell(report[1])
            elif over:
                break
            elif stop.is_set():
                raise SystemExit(0)
    except BaseException:
        _end(hub, task.run_id, control, training)
        raise
    finally:
        forget_nearby(task.config.training.default.memory_copy, directory)
    return _judged(found)


def _next(hub: Any, run_id: str, seen: Number, seconds: float) -> tuple[Number, Result] | None:
    try:
        report: tuple[Number, Result] | None = ray.get(hub.next_report.remote(run_id, seen, seconds))
    except RayTaskError as error:
        raise error.cause from None
    return report


def _judged(found: list[Outcome]) -> str | None:
    if not found:
        raise RunFailedError("the trial's workers ended without a word")
    status, reason, error = found[0]
    if status is Status.COMPLETED:
        return None
    if reason == "stopped by request":
        return STOPPED
    if error is not None and is_hopeless(error):
        raise error
    raise TrialGivenUpError(reason)


def _end(hub: Any, run_id: str, control: _Control, training: threading.Thread) -> None:
    """Let rank 0 finish what it is saving, then end the workers and their controller; waits until they are gone."""
    try:
        if ray.get(hub.waits_for_answer.remote(run_id)):
            ray.get(hub.end_reports.remote(run_id, _WRITING_SECONDS))
    except RayError as error:
        log.warning("the trial's workers are ended without a word to them", error=str(error).splitlines()[0])
    control.abort()
    training.join(_KILLED_SECONDS)
