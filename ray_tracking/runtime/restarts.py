"""Whether Ray Train starts the workers again after a failure: as often as there is progress in between.

Runs in Ray Train's controller, in the place of its own policy, which counts failures over the whole run. What ended an
attempt, and why it is not tried again, is told to the tracker from here.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure
from ray.train.v2.api.config import FailureConfig as RayFailureConfig
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.config import Config
from ray_tracking.errors import RayTrackingError
from ray_tracking.runs.store import RunStore
from ray_tracking.runtime.capacity import per_worker
from ray_tracking.runtime.failures import hopeless_of, reason_of
from ray_tracking.runtime.retrying import Ending, back_off, decide
from ray_tracking.storage import Storage

_LOOK_SECONDS = 30.0
"""How long a failure waits for the storage to say which checkpoints there are."""
_START_VARIABLE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"


class RestartPolicy(DefaultFailurePolicy):
    """`environment`: what a process on this host needs to reach the storage. `actor`: the tracker."""

    def __init__(self, config: Config, run_id: str, storage: str, environment: Mapping[str, str], actor: Any) -> None:
        super().__init__(RayFailureConfig(max_failures=-1))
        self._rules = config.failure
        self._scaling = config.scaling
        self._run_id = run_id
        self._storage = storage
        self._environment = dict(environment)
        self._actor = actor
        self._failures = 0
        """Since the last progress."""
        self._step = -1
        """Of the newest checkpoint at the last failure."""
        self._kernel_kills = kernel_kills()
        self._waiting_since: float | None = None

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if isinstance(training_failed_error, ControllerError):
            return self._after_no_start(training_failed_error)
        self._waiting_since = None
        before, self._kernel_kills = self._kernel_kills, kernel_kills()
        here = ray.util.get_node_ip_address() if self._kernel_kills > before else None
        self._tell("end_attempt", reason_of(training_failed_error, kernel_killed_on=here).summary)
        if _is_preemption_failure(training_failed_error):
            return FailureDecision.RETRY
        if hopeless_of(training_failed_error) is not None:
            return FailureDecision.RAISE
        return self._after_failure()

    def _after_failure(self) -> FailureDecision:
        most = self._rules.max_failures
        if most < 0:
            return FailureDecision.RETRY
        step = self._newest_step() if most else -1
        verdict = decide(Ending.FAILED, retries=most, failures=self._failures, progressed=step > self._step)
        self._failures, self._step = verdict.failures, max(step, self._step)
        if verdict.again:
            return FailureDecision.RETRY
        if most:
            self._tell("give_up", given_up(verdict.failures, self._step, most))
        return FailureDecision.RAISE

    def _after_no_start(self, error: ControllerError) -> FailureDecision:
        """No room for the workers, or they died at once. Ray by itself tries for ever and says nothing to the user."""
        if _died_at_once(error.controller_failure):
            self._tell("warn", reason_of(error).summary)
            decision = self._after_failure()
            if decision is FailureDecision.RETRY:
                time.sleep(back_off(max(self._failures, 1)))  # nothing runs that the controller could miss
            return decision
        if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
            return FailureDecision.RAISE
        now = time.monotonic()
        if self._waiting_since is None:
            self._waiting_since = now - float(os.environ.get(_START_VARIABLE, 60.0))
        waited, most = now - self._waiting_since, self._rules.start_timeout_secs
        text = f"the workers have not started for {waited:.0f} s: {self._room()}"
        if most is not None and waited >= most:
            self._tell("give_up", f"{text} (failure.start_timeout_secs: {most:g})")
            return FailureDecision.RAISE
        self._tell("warn", text)
        return FailureDecision.RETRY

    def _room(self) -> str:
        each = " and ".join(f"{amount:g} {name}" for name, amount in per_worker(self._scaling).items()) or "nothing"
        wanted = f"{self._scaling.workers} workers need {each} each"
        try:
            free, there = ray.available_resources(), ray.cluster_resources()
        except RayError as error:
            return f"{wanted}; the cluster does not say what is free ({error})"
        names = per_worker(self._scaling)
        return f"{wanted}; free: " + ", ".join(
            f"{free.get(name, 0):g} of {there.get(name, 0):g} {name}" for name in names
        )

    def _newest_step(self) -> int:
        """The step of the newest checkpoint; -1 if there is none, or none that can be seen within a bounded time."""
        found: list[int] = []
        thread = threading.Thread(target=self._look, args=(found,), name="ray-tracking-progress", daemon=True)
        thread.start()
        thread.join(_LOOK_SECONDS)
        return max(found, default=-1)

    def _look(self, found: list[int]) -> None:
        for name, value in self._environment.items():
            os.environ.setdefault(name, value)
        try:
            directory = RunStore(Storage.open(self._storage)).directory(self._run_id)
            found.extend([info.step for info in CheckpointStore(directory).checkpoints()])
        except (RayTrackingError, OSError) as error:
            self._tell("warn", f"it can't be seen whether there is a new checkpoint: {error}")

    def _tell(self, method: str, text: str) -> None:
        # Not awaited: an answer is not needed, and waiting would hold up the restart.
        self._actor.call.remote(method, text)


def _died_at_once(cause: Exception) -> bool:
    """Whether workers were there and were lost while they started; an error in what they run is another thing."""
    lost = WorkerGroupStartupFailedError | RayActorError | NodeDiedError | OutOfMemoryError | WorkerCrashedError
    return isinstance(cause, lost) and not isinstance(cause, RayTaskError)


def given_up(failures: int, step: int, most: int) -> str:
    """Why the workers are not started again."""
    since = f"since that of step {step}" if step >= 0 else "(there is none yet)"
    return f"it failed {failures} times in a row without a new checkpoint {since}; failure.max_failures: {most}"


def kernel_kills() -> int:
    """Processes of this host that its kernel has killed for want of memory, since it was started; 0 if it won't say."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0
