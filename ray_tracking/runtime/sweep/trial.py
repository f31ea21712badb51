"""What Ray Tune runs for each trial: the same worker body as `train`, in its own process or in a group of workers."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle
import ray
import torch
from ray import tune
from ray.exceptions import RayError
from ray.train._internal.session import get_session

from ray_tracking.checkpoint.keys import Keyring
from ray_tracking.checkpoint.manifest import Manifest
from ray_tracking.config import Config
from ray_tracking.config.merging import merge
from ray_tracking.errors import RunFailedError, UsageError
from ray_tracking.runs.store import RunStore
from ray_tracking.runtime.failures import is_hopeless
from ray_tracking.runtime.stopping import STOPPED
from ray_tracking.runtime.sweep.group import ToHub, TrialGivenUpError, run_group
from ray_tracking.runtime.sweep.handle import TrialHandle, reason_in_words
from ray_tracking.runtime.sweep.holding import Takeover
from ray_tracking.runtime.sweep.hub import Begun
from ray_tracking.runtime.sweep.reporting import STATE_STEP, Result, Tell, TuneReporter
from ray_tracking.runtime.sweep.takeover import take_over
from ray_tracking.runtime.worker import WorkerTask, work
from ray_tracking.storage import Storage

POINTER = "state.json"
"""In what Ray Tune takes for a checkpoint: whose state it stands for, and of which step."""
_ENDING_SECONDS = 40.0


class TrialStoppedError(UsageError):
    """Somebody asked this trial to end early (`ray-tracking stop`); it is not tried again."""


class TrialFailedError(RunFailedError):
    """What Ray Tune is told of a trial that failed; the reason is in the trial's record."""


class EndsInOrder:
    """Mixed into the actor that Ray Tune makes of the function: a trial that is stopped ends before its process does.

    By itself Tune waits only where the process is used again.
    """

    def cleanup(self) -> None:
        session: Any = get_session()
        if session is not None and session.training_started:
            session.stop_event.set()
            session.continue_lock.release()
            threading.Thread.join(session.training_thread, _ENDING_SECONDS)
        super().cleanup()  # type: ignore[misc]


def trial_function(hub: Any) -> Callable[[dict[str, Any]], None]:
    """The function for Ray Tune."""

    def trial(config: dict[str, Any]) -> None:
        run_trial(hub, config["params"], config.get("takeover"))

    trial.__mixins__ = (EndsInOrder,)  # type: ignore[attr-defined]
    return trial


def run_trial(hub: Any, params: Mapping[str, Any], takeover: Mapping[str, Any] | None) -> None:
    here = cloudpickle.dumps(ray.get_runtime_context().current_actor)
    tune_id, is_ready = tune.get_context().get_trial_id(), takeover is None
    begun: Begun = ray.get(hub.begin.remote(tune_id, params, here, is_ready=is_ready))
    task: WorkerTask = cloudpickle.loads(begun.task)
    config = task.config.model_copy(update={"params": merge(task.config.params, params)})
    try:
        actor = TrialHandle(hub, begun.run_id)
        task = replace(task, run_id=begun.run_id, config=config, actor=actor, attempt=begun.attempt)
        _train(hub, task, begun, None if takeover is None else Takeover(**takeover))
    except SystemExit:
        with suppress(RayError):
            ray.get(hub.rest.remote(begun.run_id, begun.since))  # said before this process is gone
        raise
    except Exception as error:
        reason = reason_in_words(error)
        ray.get(hub.failed.remote(begun.run_id, reason, is_hopeless(error) or isinstance(error, TrialGivenUpError)))
        raise TrialFailedError(reason) from error
    hub.rest.remote(begun.run_id, begun.since)


def _train(hub: Any, task: WorkerTask, begun: Begun, takeover: Takeover | None) -> None:
    """To the trial's end. Raises what ended it otherwise; SystemExit when Ray Tune ends it."""
    for name, value in task.environment.items():
        os.environ.setdefault(name, value)
    runs = RunStore(Storage.open(task.storage))
    directory = runs.directory(task.run_id)
    rules = task.config.training.default
    taken = None if takeover is None else take_over(runs, task.run_id, takeover, Keyring.from_config(rules.encryption))

    def reporter(tell: Tell) -> TuneReporter:
        return TuneReporter(rules.monitor, directory, tell, with_state=begun.with_state, taken=taken)

    def tell_tune(result: Result) -> None:
        _tell_tune(result, task.run_id)

    if task.config.scaling.workers > 1:
        task = replace(task, reporter=reporter(ToHub(hub, task.run_id)))
        outcome = run_group(hub, task, directory, tell_tune)
    else:
        task = replace(task, reporter=reporter(lambda result, _: tell_tune(result)))
        outcome = work({"task": task, "place": InTrial(task.config)})
    if outcome == STOPPED:
        raise TrialStoppedError("stopped by request")


def _tell_tune(result: Result, run_id: str) -> None:
    step = result.get(STATE_STEP, -1)
    if step < 0:
        tune.report(result)
        return
    with tempfile.TemporaryDirectory(prefix="ray-tracking-") as folder:
        Path(folder, POINTER).write_text(json.dumps({"run_id": run_id, "step": step}))
        tune.report(result, checkpoint=tune.Checkpoint(folder))


class InTrial:
    """The one rank of a trial, in the process that Ray Tune has started for it."""

    rank = 0
    world_size = 1
    local_rank = 0

    def __init__(self, config: Config) -> None:
        on_gpu = config.scaling.use_gpu and torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")

    def folder(self, attempt: int) -> str:
        return f"attempt-{attempt:03d}"

    def register(self, metrics: Mapping[str, Any], folder: str, written: Future[Manifest]) -> None:
        """Nobody is to be told: checkpoints are found on storage."""

    def is_preempted(self) -> bool:
        return False
