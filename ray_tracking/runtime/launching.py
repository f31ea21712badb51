"""The workers of one run, from their start by Ray Train to their end, and what that end is called.

In: a WorkerTask. Out: an `Outcome`; nothing that training does wrong is raised here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from ray.exceptions import RayError
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from ray_tracking.errors import RayTrackingError, RunFailedError, RunStoppedError
from ray_tracking.log import get_logger, is_debug
from ray_tracking.runs.record import Status
from ray_tracking.runtime.actor import ActorTransport
from ray_tracking.runtime.failures import Reason, hopeless_of, reason_of
from ray_tracking.runtime.interrupts import InterruptibleTrainer, Interrupts
from ray_tracking.runtime.restarts import RestartPolicy
from ray_tracking.runtime.stopping import STOPPED
from ray_tracking.runtime.worker import WorkerTask, work
from ray_tracking.storage import Storage
from ray_tracking.tracking.transport import TransportError

log = get_logger()


class Outcome(NamedTuple):
    """`reason` is for the record, `error` for the caller: None if training was completed."""

    status: Status
    reason: str
    error: BaseException | None = None


class Owner(Protocol):
    """Of the run; inside the block `abort` is called, on another thread, if training is to be aborted."""

    def aborting(self, abort: Callable[[], object]) -> AbstractContextManager[None]: ...


def train_on_ray(
    task: WorkerTask,
    directory: Storage,
    attempt: int,
    owner: Owner,
    kind: type[InterruptibleTrainer] = InterruptibleTrainer,
) -> Outcome:
    """Blocks until training is through, has failed for good, or was stopped. `attempt` names Ray's run directory.

    If another process becomes the run's owner, training is aborted: `owner.check` raises then.
    """
    trainer = _trainer(task, directory, attempt, kind)
    tracker = ActorTransport(task.actor)
    interrupts = Interrupts(tracker)
    try:
        with owner.aborting(trainer.abort), interrupts.handled():
            result: Any = trainer.fit()
    except TrainingFailedError as error:
        if (refused := hopeless_of(error)) is not None:
            return Outcome(Status.FAILED, str(refused).splitlines()[0], refused)
        return _failed(task.run_id, reason_of(error), _why_given_up(tracker))
    except RayError as error:
        lost = f"Ray's controller or cluster died: {str(error).strip().splitlines()[0]}"
        return _failed(task.run_id, Reason(lost), None)
    except KeyboardInterrupt as error:
        trainer.abort()
        return Outcome(Status.ABORTED, "interrupted", error)
    if result.return_value != STOPPED:
        return Outcome(Status.COMPLETED, "completed")
    if interrupts.came:
        log.warning("interrupted; its state is saved", go_on=f"ray-tracking resume {task.run_id}")
        return Outcome(Status.ABORTED, "interrupted", KeyboardInterrupt("terminated"))
    stopped = RunStoppedError(
        f"The run {task.run_id} was stopped by request.",
        hint=f"Its state is saved. Go on with it: ray-tracking resume {task.run_id}",
    )
    return Outcome(Status.ABORTED, "stopped by request", stopped)


def _trainer(
    task: WorkerTask, directory: Storage, attempt: int, kind: type[InterruptibleTrainer]
) -> InterruptibleTrainer:
    scaling = task.config.scaling
    trainer = kind(
        work,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(
            num_workers=scaling.workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker=dict(scaling.resources_per_worker) or None,
        ),
        run_config=RunConfig(
            name=f"attempt-{attempt:03d}",
            storage_path=directory.root,
            storage_filesystem=directory.portable_filesystem(),
            failure_config=FailureConfig(max_failures=-1),  # the policy below decides
            # What goes wrong is said by us, with its cause; the whole of Ray's account is in its log files.
            logging_config=LoggingConfig("INFO" if is_debug() else "CRITICAL"),
        ),
    )
    trainer.restarts = RestartPolicy(task.config, task.run_id, task.storage, task.environment, task.actor)
    return trainer


def _failed(run_id: str, reason: Reason, given_up: str | None) -> Outcome:
    where = f"\n\n{reason.traceback}\n" if reason.traceback else ""
    why = f"\nNot tried again: {given_up}." if given_up else ""
    error = RunFailedError(
        f"The run {run_id} failed: {reason.summary}{where}{why}",
        hint=f"What it logged and its checkpoints are kept: `ray-tracking runs show {run_id}`.",
    )
    return Outcome(Status.FAILED, reason.summary + (f" (not tried again: {given_up})" if given_up else ""), error)


def _why_given_up(tracker: ActorTransport) -> str | None:
    try:
        message: str | None = tracker.call("hopeless", timeout=10.0)
        return message
    except (TransportError, RayTrackingError):
        return None
