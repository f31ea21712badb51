"""What runs on every worker: sets up the `run`, calls the training function, and ends in order."""

from __future__ import annotations

from ray_tracking.runtime import imports

# isort: split
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from ray.train.v2._internal.execution import context as report_context

from ray_tracking.checkpoint import CheckpointStore, CheckpointStrategy
from ray_tracking.checkpoint.manifest import Manifest
from ray_tracking.checkpoint.writer import WriterOptions
from ray_tracking.config import Config
from ray_tracking.errors import CheckpointError, JournalError, LeaseError, RayTrackingError
from ray_tracking.log import configure, is_debug
from ray_tracking.runs.store import RunStore
from ray_tracking.runtime import collective
from ray_tracking.runtime.actor import ActorTransport
from ray_tracking.runtime.agenda import PREEMPTED, STOP, TIMED, Agenda
from ray_tracking.runtime.collective import broadcast
from ray_tracking.runtime.context import Position, Run
from ray_tracking.runtime.failures import note_traceback
from ray_tracking.runtime.hangs import HangWatch, Pulse, fail_group, group_of_ranks
from ray_tracking.runtime.nearby import claim_nearby
from ray_tracking.runtime.place import InRayTrain, Place
from ray_tracking.runtime.preemption import Notices
from ray_tracking.runtime.saving import Saver
from ray_tracking.runtime.stopping import STOPPED, TrainingStopped
from ray_tracking.storage import Storage
from ray_tracking.tracking.base import ExperimentTracker, NoopTracker
from ray_tracking.tracking.logger import RunLogger
from ray_tracking.tracking.sender import Sender
from ray_tracking.tracking.transport import TransportError

_PROGRESS_SECONDS = 1.0
_FLUSH_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class WorkerTask:
    """What the driver sends to every worker."""

    run_id: str
    storage: str
    config: Config
    train: Callable[[Run], Any]
    actor: Any
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    reporter: Reporter | None = None
    """Of a sweep: looks through what rank 0 logs for the metric that is searched for."""
    attempt: int | None = None
    """Begun already; None: rank 0 begins it."""


Register = Callable[[Mapping[str, Any], str, "Future[Manifest]"], None]


class Reporter(Protocol):
    """Sees what a trial restores, logs and saves, and its end."""

    def attach(self, run: Run) -> None:
        """On all ranks, before training."""
        ...

    def watch(self, run: Run, sender: Sender) -> Callable[..., None]:
        """On rank 0: its `log_metrics`."""
        ...

    def registering(self, plain: Register, attempt_folder: str) -> Register:
        """On all ranks: what is told of each checkpoint as it is begun."""
        ...

    def finish(self) -> None:
        """On rank 0: the training function has returned, and all checkpoints are written."""
        ...


class RunTracker(NoopTracker):
    """The tracker inside a training function: the run is begun and ended by the trainer, not by the function."""

    def __init__(self, logger: RunLogger, sender: Sender, run_id: str) -> None:
        self.run_id = run_id
        self.log_metrics = logger.log_metrics  # type: ignore[method-assign]
        self.log_params = logger.log_params  # type: ignore[method-assign]
        self.log_histogram = logger.log_histogram  # type: ignore[method-assign]
        self.log_text = logger.log_text  # type: ignore[method-assign]
        self.log_image = logger.log_image  # type: ignore[method-assign]
        self.log_artifact = logger.log_artifact  # type: ignore[method-assign]
        self._sender = sender

    def flush(self, timeout: float = 30.0) -> bool:
        return self._sender.flush(timeout)


def work(loop_config: Mapping[str, Any]) -> str | None:
    """The train function given to Ray Train: `loop_config` is {"task": WorkerTask}. Returns STOPPED if it was.

    A sweep's trial calls it too, with {"place": Place} in it.
    """
    task: WorkerTask = loop_config["task"]
    imports.import_what_training_needs()
    for name, value in task.environment.items():
        os.environ.setdefault(name, value)
    place: Place = loop_config.get("place") or InRayTrain()
    rank, world_size = place.rank, place.world_size
    collective.start()
    transport = ActorTransport(task.actor)
    pulse = Pulse()
    watch = _hang_watch(task, place, transport, pulse)
    attempt = task.attempt or broadcast(transport.call("begin_attempt", world_size) if rank == 0 else None)
    configure(
        task.config.logging.level,
        json=bool(task.config.logging["json"]),
        run=task.run_id,
        attempt=attempt,
        rank=rank,
    )
    if not is_debug():
        # It tells of every report on every rank, under a name that Ray's own log level does not reach.
        report_context.logger.setLevel(logging.ERROR)
    _seed(task.config.seed, rank)
    directory = RunStore(Storage.open(task.storage)).directory(task.run_id)
    sender = Sender(transport, rank=rank, attempt=attempt)
    rules = task.config.training.default
    options = WriterOptions.from_config(rules)
    saver = Saver(
        CheckpointStore(directory, place.folder(attempt), keyring=options.keyring),
        CheckpointStrategy.from_config(rules),
        options,
        rank=rank,
        world_size=world_size,
        attempt=attempt,
        attempts=broadcast(RunStore(Storage.open(task.storage)).load(task.run_id).attempts if rank == 0 else None),
        before_commit=lambda: _may_commit(sender, transport),  # on every rank: their own numbers make a curve too
        register=place.register
        if task.reporter is None
        else task.reporter.registering(place.register, place.folder(attempt)),
        fail_on_error=rules.on_write_failure == "fail",
        nearby=claim_nearby(rules.memory_copy, directory),
    )
    signals = _Signals(saver, place)
    position = Position()
    logger = RunLogger(sender, position, directory.child("artifacts"))

    def announce(resumed_from_step: int) -> None:
        """On all ranks: no record of the attempt comes before the one that says what it goes on from."""
        if rank == 0:
            logger.begin_attempt(resumed_from_step)
            if world_size > 1:  # else there is one sender, and what it sends stays in order
                _all_journaled(sender)
        broadcast(None)

    announce(saver.newest_step)
    tracker: ExperimentTracker = RunTracker(logger, sender, task.run_id) if rank == 0 else NoopTracker()
    run = Run(
        task.config,
        rank=rank,
        world_size=world_size,
        local_rank=place.local_rank,
        device=place.device,
        attempt=attempt,
        position=position,
        tracker=tracker,
        log_rank_metrics=logger.log_rank_metrics,
        saver=saver,
        agenda=Agenda(signals.look),
        latest=sender.latest if rank == 0 else dict,
        announce=announce,
        pulse=pulse,
    )
    if task.reporter is not None:
        task.reporter.attach(run)
    watch.logged, watch.step = lambda: sender.logged, lambda: run.step
    if task.reporter is not None and rank == 0:
        run.log_metrics = tracker.log_metrics = task.reporter.watch(run, sender)  # type: ignore[method-assign]
    run.log_params(run.params)
    over = threading.Event()
    if rank == 0:
        threading.Thread(target=_tell_progress, args=(run, signals, transport, over), daemon=True).start()
    try:
        task.train(run)
        run.finish()
        if task.reporter is not None and rank == 0 and not run.was_stopped:
            task.reporter.finish()
        return STOPPED if run.was_stopped else None
    except TrainingStopped:
        # Not raised on: Ray would take it for a failure and start the workers again.
        run.close()
        return STOPPED
    except SystemExit:  # how Ray Tune ends a trial: what is being written is still finished
        with suppress(CheckpointError):
            saver.close()
        raise
    except Exception as error:
        note_traceback(error)
        run.save_after(error)
        raise
    finally:
        over.set()
        sender.close()
        watch.stop()


class _Signals:
    """What rank 0 looks at when the ranks meet."""

    def __init__(self, saver: Saver, place: Place) -> None:
        self.stop_requested = False
        self.lost: LeaseError | None = None
        """Another process writes the run: training on would be in vain."""
        self._saver = saver
        self._place = place
        self._notices = Notices()

    def look(self) -> int:
        if self.lost is not None:
            raise self.lost
        return TIMED * self._saver.is_time() | PREEMPTED * self._must_save() | STOP * self.stop_requested

    def _must_save(self) -> bool:
        preempted = self._place.is_preempted()
        deadline = self._place.deadline() if preempted and isinstance(self._place, InRayTrain) else None
        return self._notices.is_due(preempted, deadline, time.time(), self._saver.write_seconds)


def _hang_watch(task: WorkerTask, place: Place, transport: ActorTransport, pulse: Pulse) -> HangWatch:
    """Begun before the ranks meet for the first time: one that never comes is missed, too."""
    watch = HangWatch(
        transport,
        pulse,
        group=group_of_ranks() if isinstance(place, InRayTrain) else "",
        rank=place.rank,
        world_size=place.world_size,
        limit=task.config.failure.hang_timeout_secs if isinstance(place, InRayTrain) else None,
        fail=fail_group,
    )
    watch.start()
    return watch


def _tell_progress(run: Run, signals: _Signals, transport: ActorTransport, over: threading.Event) -> None:
    while not over.wait(_PROGRESS_SECONDS):
        try:
            signals.stop_requested = bool(transport.call("report_progress", run.position(), timeout=5.0))
        except LeaseError as error:
            signals.lost = error
            return
        except (TransportError, RayTrackingError):
            continue  # the tracker restarts, or its storage is away; the sender says so


def _may_commit(sender: Sender, transport: ActorTransport) -> None:
    """Asked of the tracker even if it has all records: it must still be the one that writes the run."""
    _all_journaled(sender)
    try:
        transport.call("confirm")
    except TransportError as error:
        raise JournalError(f"the tracker can't be asked whether the run is still ours: {error}") from error


def _all_journaled(sender: Sender) -> None:
    if not sender.flush(_FLUSH_SECONDS):
        raise JournalError(f"the tracker did not journal the records before it within {_FLUSH_SECONDS:.0f} s")


def _seed(seed: int, rank: int) -> None:
    """Every rank draws its own random numbers, the same in every run of this seed and world size."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)
