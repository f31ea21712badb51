"""What Ray Tune runs for each trial of one worker: the same worker body as `train`, in Tune's own process.

A metric that is searched for goes to Tune when the training function logs it; Tune then says whether to go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import cloudpickle
import pyarrow.compute as pc
import ray
import torch
from ray import tune

from ray_tracking.checkpoint.manifest import Manifest
from ray_tracking.config.merging import merge
from ray_tracking.errors import JournalError, RunFailedError, UsageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.runs.store import RunStore
from ray_tracking.runtime.context import Run
from ray_tracking.runtime.failures import is_hopeless
from ray_tracking.runtime.stopping import STOPPED
from ray_tracking.runtime.sweep.hub import Begun, TrialHandle, reason_in_words
from ray_tracking.runtime.worker import WorkerTask, work
from ray_tracking.storage import Storage
from ray_tracking.tracking.sender import Sender

REPORTS = "reports"
"""The number of reports of a trial, resumed ones included: what schedulers count by."""
_JOURNAL_SECONDS = 120.0


class TrialDivergedError(UsageError):
    """The metric that is searched for is no longer a number: training on would be in vain."""


class TrialStoppedError(UsageError):
    """Somebody asked this trial to end early (`ray-tracking stop`); it is not tried again."""


class TrialFailedError(RunFailedError):
    """What Ray Tune is told of a trial that failed; the reason is in the trial's record."""


def trial_function(hub: Any) -> Callable[[dict[str, Any]], None]:
    """The function for Ray Tune."""

    def trial(config: dict[str, Any]) -> None:
        run_trial(hub, config["params"])

    return trial


def run_trial(hub: Any, params: Mapping[str, Any]) -> None:
    actor = ray.get_runtime_context().current_actor
    begun: Begun = ray.get(hub.begin.remote(tune.get_context().get_trial_id(), params, actor))
    task: WorkerTask = cloudpickle.loads(begun.task)
    config = task.config.model_copy(update={"params": merge(task.config.params, params)})
    directory = RunStore(Storage.open(task.storage)).directory(begun.run_id)
    reporter = TuneReporter(task.config.training.default.monitor, directory)
    task = replace(task, run_id=begun.run_id, config=config, actor=TrialHandle(hub, begun.run_id), reporter=reporter)
    try:
        if work({"task": task, "place": InTrial(config.scaling.use_gpu)}) == STOPPED:
            raise TrialStoppedError("stopped by request")
        reporter.finish()
    except Exception as error:
        reason = reason_in_words(error)
        ray.get(hub.failed.remote(begun.run_id, reason, is_hopeless(error)))
        raise TrialFailedError(reason) from error


class InTrial:
    """The one rank of a trial, in the process that Ray Tune has started for it."""

    rank = 0
    world_size = 1
    local_rank = 0

    def __init__(self, use_gpu: bool) -> None:
        self.device = torch.device("cuda", 0) if use_gpu and torch.cuda.is_available() else torch.device("cpu")

    def folder(self, attempt: int) -> str:
        return f"attempt-{attempt:03d}"

    def register(self, metrics: Mapping[str, Any], folder: str, written: Future[Manifest]) -> None:
        """Nobody is to be told: checkpoints are found on storage."""

    def is_preempted(self) -> bool:
        return False


class TuneReporter:
    """Reports the metric to Ray Tune, on the training thread, whenever it is logged."""

    def __init__(self, metric: str, directory: Storage) -> None:
        self._metric = metric
        self._directory = directory
        self._reports: int | None = None
        self._run: Run | None = None

    def watch(self, run: Run, sender: Sender) -> Callable[..., None]:
        plain, self._run = run.log_metrics, run

        def log_metrics(metrics: dict[str, Any], step: int | None = None) -> None:
            plain(metrics, step=step)
            if self._metric in metrics:
                self._report(run, sender, float(metrics[self._metric]))

        return log_metrics

    def finish(self) -> None:
        """After training: there must have been something to go by, now or before the trial was interrupted."""
        if self._reports is not None:
            return
        assert self._run is not None
        earlier = self._earlier(self._run.step + 1)
        if not earlier:
            raise UsageError(
                f"The trial never logged {self._metric!r}, the metric that is searched for.",
                hint="Set sweep.metric to a key that the training function logs.",
            )
        # Interrupted between its last checkpoint and its end: nothing was left to train.
        tune.report(self._result(self._run, earlier[-1], len(earlier)))

    def _report(self, run: Run, sender: Sender, value: float) -> None:
        if not sender.flush(_JOURNAL_SECONDS):  # Tune may end this process in return
            raise JournalError(f"the tracker did not journal the records within {_JOURNAL_SECONDS:.0f} s")
        if self._reports is None:
            self._reports = len(self._earlier(run.step)) if run.attempt > 1 else 0
        if not _is_finite(value):
            raise TrialDivergedError(f"diverged: {self._metric} is {value} at step {run.step}")
        self._reports += 1
        tune.report(self._result(run, value, self._reports))

    def _result(self, run: Run, value: float, reports: int) -> dict[str, Any]:
        return {self._metric: value, "step": run.step, "epoch": run.epoch, REPORTS: reports}

    def _earlier(self, step: int) -> list[float]:
        """What was reported before `step` and still counts, by earlier attempts."""
        table = JournalReader(self._directory, strict=False).effective()
        before = pc.and_(pc.equal(table["key"], self._metric), pc.less(table["step"], step))
        return [float(value) for value in table.filter(before)["value"].to_pylist()]


def _is_finite(value: float) -> bool:
    return value - value == 0.0
