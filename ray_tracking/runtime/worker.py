"""What runs on every worker: sets up the `run`, calls the training function, and ends in order."""

from __future__ import annotations

import logging
import os
import random
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
from ray.train.v2._internal.execution import context as report_context
from ray.train.v2._internal.execution.context import get_train_context as get_internal_train_context

from ray_tracking.checkpoint import CheckpointStore, CheckpointStrategy
from ray_tracking.checkpoint.writer import WriterOptions
from ray_tracking.config import Config
from ray_tracking.errors import JournalError
from ray_tracking.log import configure, is_debug
from ray_tracking.runs.store import RunStore
from ray_tracking.runtime import collective
from ray_tracking.runtime.actor import ActorTransport
from ray_tracking.runtime.agenda import PREEMPTED, STOP, TIMED, Agenda
from ray_tracking.runtime.collective import broadcast
from ray_tracking.runtime.context import Position, Run
from ray_tracking.runtime.failures import is_hopeless, note_traceback
from ray_tracking.runtime.saving import Saver
from ray_tracking.storage import Storage
from ray_tracking.tracking.base import ExperimentTracker, NoopTracker
from ray_tracking.tracking.logger import RunLogger
from ray_tracking.tracking.sender import Sender
from ray_tracking.tracking.transport import TransportError

_PROGRESS_SECONDS = 0.5
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


def work(loop_config: Mapping[str, Any]) -> None:
    """The train function given to Ray Train: `loop_config` is {"task": WorkerTask}."""
    task: WorkerTask = loop_config["task"]
    for name, value in task.environment.items():
        os.environ.setdefault(name, value)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    collective.start()
    transport = ActorTransport(task.actor)
    if broadcast(transport.call("hopeless") if rank == 0 else None):
        return  # Ray has started the group again, as it always does; the driver says why it was in vain
    attempt = broadcast(transport.call("begin_attempt", world_size) if rank == 0 else None)
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
        CheckpointStore(directory, os.path.basename(context.get_storage().experiment_fs_path), keyring=options.keyring),
        CheckpointStrategy.from_config(rules),
        options,
        rank=rank,
        world_size=world_size,
        attempt=attempt,
        before_commit=lambda: _all_journaled(sender),  # on every rank: their own numbers make a curve too
        fail_on_error=rules.on_write_failure == "fail",
    )
    signals = _Signals(saver)
    position = Position()
    logger = RunLogger(sender, position, directory.child("artifacts"))

    def announce(resumed_from_step: int) -> None:
        """On all ranks: no record of the attempt comes before the one that says what it goes on from."""
        if rank == 0:
            logger.begin_attempt(resumed_from_step)
            _all_journaled(sender)
        broadcast(None)

    announce(saver.newest_step)
    tracker: ExperimentTracker = RunTracker(logger, sender, task.run_id) if rank == 0 else NoopTracker()
    run = Run(
        task.config,
        rank=rank,
        world_size=world_size,
        local_rank=context.get_local_rank(),
        device=ray.train.torch.get_device(),
        attempt=attempt,
        position=position,
        tracker=tracker,
        log_rank_metrics=logger.log_rank_metrics,
        saver=saver,
        agenda=Agenda(signals.look),
        latest=sender.latest if rank == 0 else dict,
        announce=announce,
    )
    run.log_params(run.params)
    over = threading.Event()
    if rank == 0:
        threading.Thread(target=_tell_progress, args=(run, signals, transport, over), daemon=True).start()
    try:
        task.train(run)
        run.finish()
    except Exception as error:
        note_traceback(error)
        if is_hopeless(error):
            with suppress(TransportError):
                transport.call("give_up", str(error))
        run.save_after(error)
        raise
    finally:
        over.set()
        sender.close()


class _Signals:
    """What rank 0 looks at when the ranks meet."""

    def __init__(self, saver: Saver) -> None:
        self.stop_requested = False
        self._saver = saver

    def look(self) -> int:
        preempted = get_internal_train_context().preemption_context.preemption_info is not None
        return TIMED * self._saver.is_time() | PREEMPTED * preempted | STOP * self.stop_requested


def _tell_progress(run: Run, signals: _Signals, transport: ActorTransport, over: threading.Event) -> None:
    while not over.wait(_PROGRESS_SECONDS):
        try:
            signals.stop_requested = bool(transport.call("report_progress", run.position(), timeout=5.0))
        except TransportError:
            continue  # the tracker restarts; the sender says so


def _all_journaled(sender: Sender) -> None:
    if not sender.flush(_FLUSH_SECONDS):
        raise JournalError(f"the tracker did not journal the records before it within {_FLUSH_SECONDS:.0f} s")


def _seed(seed: int, rank: int) -> None:
    """Every rank draws its own random numbers, the same in every run of this seed and world size."""
    random.seed(seed + rank)
    np.random.seed((seed + rank) % 2**32)
    torch.manual_seed(seed + rank)
