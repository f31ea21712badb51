"""What Ray Tune tells the driver while a sweep runs: into the book, to the hub, to whoever looks on."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.tune import Callback

from ray_tracking.log import get_logger
from ray_tracking.runs.record import Status
from ray_tracking.runs.sweep import TrialStatus, ranking
from ray_tracking.runtime.sweep.asked import STOPPED_BY_REQUEST, Asked
from ray_tracking.runtime.sweep.book import Book
from ray_tracking.runtime.sweep.reporting import REPORTS
from ray_tracking.runtime.sweep.result import SweepProgress, time_left
from ray_tracking.runtime.sweep.stopping import Reasons

log = get_logger()

Observer = Callable[[SweepProgress], None]

_LOOK_SECONDS = 0.5
_HANG_LOOK_SECONDS = 1.0
_ANSWER_SECONDS = 10.0
_SAVING_SECONDS = 15.0
"""How long the run of a trial that is stopped stays open for the checkpoint that is being written."""
_DIED = "the worker process died: killed, out of memory, or crashed"


class Watch(Callback):
    """Called in the driver's main thread, between Ray Tune's events: it must not wait for anything long.

    A trial's run is ended by the hub meanwhile; its record says so once the hub has answered.
    """

    def __init__(
        self,
        hub: Any,
        book: Book,
        reasons: Reasons,
        metric: str,
        *,
        total: int,
        at_once: int,
        keep_best: int | None,
        hang_secs: float | None,
        observer: Observer | None,
        sweep_id: str,
    ) -> None:
        self._hub = hub
        self._book = book
        self._reasons = reasons
        self._metric = metric
        self._total = total
        self._at_once = at_once
        self._keep_best = keep_best
        self._hang_secs = hang_secs
        self._observer = observer
        self._sweep_id = sweep_id
        self._begun = time.monotonic()
        self._asked: Asked | None = None
        self._ending: dict[Any, tuple[int, TrialStatus, str]] = {}
        self._hang_look: Any = None
        """The hub's look for trials that hang."""
        self._dropped: set[int] = set()
        self._told: list[Any] = []
        """What the hub was told to do, and must have done before its end."""
        self._looked = 0.0
        self._looked_for_hangs = 0.0
        self._standing: Any = None
        self._seen: Mapping[str, Mapping[str, Any]] = {}

    def heed(self, asked: Asked) -> None:
        """From then on trials that end because the sweep was asked to stop are no failures."""
        self._asked = asked

    # --- what Tune tells ----------------------------------------------------------------------------------------------

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._book.start(trial.trial_id)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self._metric in result:
            self._book.report(trial.trial_id, result[self._metric], result[REPORTS])

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        reason = self._reasons.trials.get(trial.trial_id)
        status = TrialStatus.COMPLETED if reason is None else TrialStatus.STOPPED
        self.end(self._book.number_of(trial.trial_id), status, reason or "completed")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = self._book.number_of(trial.trial_id)
        reason = self._why_failed(number)
        log.warning("a trial failed and is tried again", trial=number, reason=reason)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        number = self._book.number_of(trial.trial_id)
        reason = self._why_failed(number)
        if self._asked and reason == STOPPED_BY_REQUEST:
            self.end(number, TrialStatus.INTERRUPTED, reason)
            return
        log.warning("a trial failed", trial=number, reason=reason)
        self.end(number, TrialStatus.FAILED, reason)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._settle(0.0)
        if self._asked is not None and self._asked.is_late:
            self._reasons.sweep = STOPPED_BY_REQUEST
        now = time.monotonic()
        if self._hang_secs is not None and now - self._looked_for_hangs >= _HANG_LOOK_SECONDS:
            self._looked_for_hangs = now
            self._end_hanging(self._hang_secs)
        if self._observer is not None and now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            self._show()

    # --- ends ---------------------------------------------------------------------------------------------------------

    def end(self, number: int, status: TrialStatus, reason: str) -> None:
        """Have the hub end the trial's run."""
        of_run = {TrialStatus.FAILED: Status.FAILED, TrialStatus.INTERRUPTED: Status.ABORTED}
        ended = of_run.get(status, Status.COMPLETED).value
        saving = _SAVING_SECONDS if status is TrialStatus.STOPPED else 0.0
        answer = self._hub.end.remote(self._book.run_id(number), ended, reason, saving)
        self._ending[answer] = number, status, reason

    def note_missed(self, trials: list[Any]) -> None:
        """After Tune: failures that it did not tell of. It forgets to for a trial whose process died while waiting."""
        for trial in trials:
            number = self._book.number_of(trial.trial_id)
            if trial.status == trial.ERROR and not self._book[number].status.is_over and not self.is_ending(number):
                self.on_trial_error(0, trials, trial)

    def is_ending(self, number: int) -> bool:
        """Whether the hub is ending the trial's run."""
        return any(ending == number for ending, _, _ in self._ending.values())

    def finish(self, timeout: float) -> None:
        """After Tune: wait for what the hub still has to end."""
        self._told.append(self._hub.hasten.remote())
        self._settle(timeout)
        for number, status, reason in self._ending.values():
            log.warning("the trial's run could not be ended in order in time", trial=number)
            self._book.end(number, status, reason, None)
        self._ending.clear()
        _, undone = ray.wait(self._told, num_returns=len(self._told), timeout=timeout) if self._told else ([], [])
        if undone:
            log.warning("not all of the sweep could be noted or tidied up in time", left=len(undone))
        if self._observer is not None:
            self._show()

    def _settle(self, timeout: float) -> None:
        """Note the ends that the hub has answered for. `timeout`: how long to wait for all of them."""
        if not self._ending:
            return
        answered, _ = ray.wait(list(self._ending), num_returns=len(self._ending), timeout=timeout)
        for answer in answered:
            number, status, reason = self._ending.pop(answer)
            value = None
            try:
                value = ray.get(answer)["metrics"].get(self._metric, {}).get("best")
            except RayError as error:
                log.warning("the trial's run could not be ended in order", trial=number, error=str(error))
            self._book.end(number, status, reason, value)
            if status.is_over:
                self._after_end(number)

    def _after_end(self, number: int) -> None:
        over = [trial for trial in self._book.trials if trial.status.is_over]
        value = self._book[number].value
        if value is not None:
            self._told.append(self._hub.note.remote(len(over), {self._metric: value}))
        if self._keep_best is not None:
            kept = {trial.number for trial in ranking(over, self._book.mode)[: self._keep_best]}
            for trial in over:
                if trial.number not in kept | self._dropped:
                    self._dropped.add(trial.number)
                    self._told.append(self._hub.drop_checkpoints.remote(self._book.run_id(trial.number)))

    def _why_failed(self, number: int) -> str:
        try:
            told: str | None = ray.get(self._hub.why_failed.remote(self._book.run_id(number)), timeout=_ANSWER_SECONDS)
        except (RayError, GetTimeoutError):
            told = None  # the hub died, too
        return told or _DIED

    def _end_hanging(self, seconds: float) -> None:
        if self._hang_look is None or ray.wait([self._hang_look], timeout=0)[0]:
            self._hang_look = self._hub.end_if_still.remote(seconds)

    # --- looking on ---------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        assert self._observer is not None
        if self._standing is not None and ray.wait([self._standing], timeout=0)[0]:
            try:
                self._seen = ray.get(self._standing)
            except RayError:
                self._seen = {}
            self._standing = None
        if self._standing is None:
            self._standing = self._hub.standing.remote()
        trials = self._book.trials
        names = {self._book.run_id(trial.number): trial.number for trial in trials}
        self._observer(
            SweepProgress(
                self._sweep_id,
                self._metric,
                self._book.mode,
                trials,
                self._total,
                {names[run_id]: at for run_id, at in self._seen.items() if run_id in names},
                time.monotonic() - self._begun,
                time_left(trials, self._total, self._at_once, time.time()),
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        return {}
