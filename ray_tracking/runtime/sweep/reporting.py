"""What a trial tells Ray Tune: the metric that is searched for, whenever rank 0 logs it.

In: what training logs, the checkpoints it saves. Out: results; Ray Tune then says whether to go on. A scheduler that
stops and continues trials is told only once the state that a result belongs to is on storage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

import pyarrow.compute as pc

from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.checkpoint.manifest import Manifest
from ray_tracking.errors import JournalError, UsageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.log import get_logger
from ray_tracking.runtime.context import Run
from ray_tracking.runtime.sweep.adapting import adapt, built_with
from ray_tracking.runtime.sweep.takeover import Taken
from ray_tracking.storage import Storage
from ray_tracking.tracking.sender import Sender

log = get_logger()

REPORTS = "reports"
"""The number of reports of a trial, resumed ones included: what schedulers count by."""
STATE_STEP = "state_step"
"""The step of the newest checkpoint of the trial when it reported; -1: none."""
IS_LAST = "is_last"
"""Whether training is through all of its epochs then, so that nothing is left to do from that state on."""
_JOURNAL_SECONDS = 120.0
_PARTS_SECONDS = 60.0
"""How long rank 0 waits for the other ranks' parts of a checkpoint."""

Result = dict[str, Any]
Register = Callable[[Mapping[str, Any], str, "Future[Manifest]"], None]


class TrialDivergedError(UsageError):
    """The metric that is searched for is no longer a number: training on would be in vain."""


class Tell(Protocol):
    """Brings a result to Ray Tune and waits until it has decided. Does not return if the trial is to end."""

    def __call__(self, result: Result, run: Run) -> None: ...


class TuneReporter:
    """Of one trial, on the training thread. `with_state`: a result waits for the checkpoint that is saved after it.

    `taken`: the state of another trial that this one goes on from.
    """

    def __init__(
        self, metric: str, directory: Storage, tell: Tell, *, with_state: bool = False, taken: Taken | None = None
    ) -> None:
        self._metric = metric
        self._directory = directory
        self._tell = tell
        self._with_state = with_state
        self._taken = taken
        self._reports: int | None = None
        self._run: Run | None = None
        """On rank 0."""
        self._waiting: Result | None = None
        self._saved = -1

    def attach(self, run: Run) -> None:
        """On every rank: optimizers that get another trial's state train on with this trial's rates."""
        plain, taken = run.restore, self._taken
        if taken is None:
            return

        def restore(**objects: Any) -> bool:
            built = built_with(objects)
            found = plain(**objects)
            if found and run.step == taken.step:
                adapt(objects, built)
            return found

        run.restore = restore  # type: ignore[method-assign]

    def watch(self, run: Run, sender: Sender) -> Callable[..., None]:
        """On rank 0: the `log_metrics` of the trial."""
        plain, self._run = run.log_metrics, run
        self._saved = run.checkpoints.newest_step
        if self._taken is not None and self._taken.is_new:
            text = (
                f"took over the state of {self._taken.takeover.run_id} at step {self._taken.step}; params: {run.params}"
            )
            run.log_text("sweep/takeover", text, step=self._taken.step)

        def log_metrics(metrics: dict[str, Any], step: int | None = None) -> None:
            plain(metrics, step=step)
            if self._metric in metrics:
                self._report(run, sender, float(metrics[self._metric]))

        return log_metrics

    def registering(self, plain: Register, attempt_folder: str) -> Register:
        """What is called for each checkpoint as it is begun, on every rank: `plain`, and what waits for it."""
        if not self._with_state:
            return plain

        def register(metrics: Mapping[str, Any], folder: str, written: Future[Manifest]) -> None:
            plain(metrics, folder, written)
            if self._run is not None and self._waiting is not None:
                if self._is_complete(f"{attempt_folder}/{folder}", written):
                    self._saved = self._run.step
                self._tell_waiting()

        return register

    def finish(self) -> None:
        """After training, on rank 0: there must have been something to go by, now or before an interruption."""
        assert self._run is not None
        self._tell_waiting()
        if self._reports is not None:
            return
        earlier = self._earlier(self._run.step + 1)
        before = self._reports_before(self._run.step + 1)
        if not earlier:
            raise UsageError(
                f"The trial never logged {self._metric!r}, the metric that is searched for.",
                hint="Set sweep.metric to a key that the training function logs.",
            )
        # Interrupted between its last checkpoint and its end: nothing was left to train.
        self._tell(self._result(self._run, earlier[-1], before), self._run)

    def _report(self, run: Run, sender: Sender, value: float) -> None:
        self._tell_waiting()
        if not sender.flush(_JOURNAL_SECONDS):  # Tune may end this process in return
            raise JournalError(f"the tracker did not journal the records within {_JOURNAL_SECONDS:.0f} s")
        if self._reports is None:
            self._reports = self._reports_before(run.step) if run.attempt > 1 or self._taken else 0
        if not _is_finite(value):
            raise TrialDivergedError(f"diverged: {self._metric} is {value} at step {run.step}")
        self._reports += 1
        self._waiting = self._result(run, value, self._reports)
        if not self._with_state:
            self._tell_waiting()

    def _tell_waiting(self) -> None:
        result, self._waiting = self._waiting, None
        if result is not None and self._run is not None:
            self._tell({**result, STATE_STEP: self._saved} if self._with_state else result, self._run)

    def _is_complete(self, folder: str, written: Future[Manifest]) -> bool:
        """Wait until the checkpoint is on storage with all ranks' parts. False (said) if that fails."""
        if written.exception() is not None:
            return False  # said where it is settled
        store = CheckpointStore(self._directory)
        end = time.monotonic() + _PARTS_SECONDS
        while (found := store.inspect(folder)).info is None and time.monotonic() < end:
            time.sleep(0.05)
        if found.info is None:
            log.warning("the trial's checkpoint is not complete: the one before it stands", reason=found.reason)
        return found.info is not None

    def _result(self, run: Run, value: float, reports: int) -> Result:
        is_last = run.total_epochs is not None and run.epoch + 1 >= run.total_epochs
        return {self._metric: value, "step": run.step, "epoch": run.epoch, REPORTS: reports, IS_LAST: is_last}

    def _reports_before(self, step: int) -> int:
        """What schedulers count by: a state that was taken over brings the reports of the trial it came from."""
        if self._taken is None:
            return len(self._earlier(step))
        return self._taken.takeover.reports + len(self._earlier(step, after=self._taken.step))

    def _earlier(self, step: int, after: int = -1) -> list[float]:
        """What was reported before `step` (and after `after`) and still counts, by earlier attempts."""
        table = JournalReader(self._directory, strict=False).effective()
        between = pc.and_(pc.less(table["step"], step), pc.greater(table["step"], after))
        rows = table.filter(pc.and_(pc.equal(table["key"], self._metric), between))
        return [float(value) for value in rows["value"].to_pylist()]


def _is_finite(value: float) -> bool:
    return value - value == 0.0
