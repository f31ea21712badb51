"""The driver's book of a sweep's trials: what was proposed, what became of it; every change goes to storage.

In: what the searcher proposes and Ray Tune tells. Out: TrialRecords, and what the searcher is to be told again when a
sweep goes on. Used from the driver's main thread alone.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from ray_tracking.runs.sweep import Milestone, SweepStore, TrialRecord, TrialStatus, best_of
from ray_tracking.runtime.sweep.reporting import REPORTS, STATE_STEP

Event = Literal["suggested", "arrived", "told"]


class Exploit(NamedTuple):
    """A trial is to go on from the state of another. `trial`, `donor`: Ray Tune's ids."""

    trial: str
    donor: str
    at: Mapping[str, Any]
    """The result by which the trial was found to be worse."""
    state: Mapping[str, Any]
    """The donor's result that its state belongs to."""
    params: Mapping[str, Any]


class Book:
    """`known`: the records of earlier sessions."""

    def __init__(self, store: SweepStore, mode: str, known: list[TrialRecord]) -> None:
        self.mode = mode
        self.since_gain = 0
        """Trials that have ended since the best of them."""
        self._store = store
        self._trials = {trial.number: trial for trial in known}
        self._by_tune: dict[str, int] = {}
        self._unfinished = deque(trial.number for trial in known if not trial.status.is_over)
        self._events = max((event for trial in known for event, _, _ in _events_of(trial)), default=0)

    @property
    def trials(self) -> list[TrialRecord]:
        return [self._trials[number] for number in sorted(self._trials)]

    @property
    def best(self) -> TrialRecord | None:
        return best_of(self._trials.values(), self.mode)

    @property
    def next_number(self) -> int:
        return max(self._trials, default=0) + 1

    def __getitem__(self, number: int) -> TrialRecord:
        return self._trials[number]

    def run_id(self, number: int) -> str:
        return self._store.run_id(number)

    def number_of(self, tune_id: str) -> int:
        return self._by_tune[tune_id]

    def history(self) -> Iterator[tuple[Event, TrialRecord, Milestone | None]]:
        """What the searcher was asked and told, in order."""
        found = [(*event, trial) for trial in self._trials.values() for event in _events_of(trial)]
        for _, kind, milestone, trial in sorted(found, key=lambda event: event[0]):
            yield kind, trial, milestone

    def propose(self, params: Mapping[str, Any], tune_id: str) -> TrialRecord:
        """The searcher has proposed a new trial."""
        self._events += 1
        trial = TrialRecord(self.next_number, dict(params), suggested=self._events, tune_id=tune_id)
        self._by_tune[tune_id] = trial.number
        self._keep(trial)
        return trial

    def take_unfinished(self, tune_id: str) -> TrialRecord | None:
        """A trial of an earlier session that is to go on; None when there is none left."""
        if not self._unfinished:
            return None
        trial = self._trials[self._unfinished.popleft()]
        self._by_tune[tune_id] = trial.number
        self._keep(replace(trial, tune_id=tune_id, status=TrialStatus.PENDING, reason=None, ended=None))
        return self._trials[trial.number]

    def start(self, tune_id: str) -> None:
        """The trial runs."""
        trial = self._trials[self.number_of(tune_id)]
        self._keep(replace(trial, status=TrialStatus.RUNNING, started=trial.started or time.time()))

    def report(self, tune_id: str, value: float, reports: int) -> None:
        """The trial has reported the metric. Not written now: its journal has it."""
        trial = self._trials[self.number_of(tune_id)]
        best = trial.value
        if math.isfinite(value) and (best is None or (value < best if self.mode == "min" else value > best)):
            best = value
        self._trials[trial.number] = replace(trial, value=best, reports=max(reports, trial.reports))

    def arrive(self, tune_id: str, reports: int, value: float) -> None:
        """The searcher is told what the trial has reached at a milestone."""
        trial = self._trials[self.number_of(tune_id)]
        self._events += 1
        self._keep(replace(trial, milestones=(*trial.milestones, Milestone(self._events, reports, value))))

    def take_over(self, exploit: Exploit) -> TrialRecord:
        """The trial goes on from another one's state, with new params."""
        trial = self._trials[self.number_of(exploit.trial)]
        takeover = {
            "number": len(trial.takeovers) + 1,
            "run_id": self.run_id(self.number_of(exploit.donor)),
            "step": exploit.state[STATE_STEP],
            "reports": exploit.state[REPORTS],
            "at_step": exploit.at["step"],
            "at_reports": exploit.at[REPORTS],
            "before": dict(trial.params),
            "time": time.time(),
        }
        self._keep(replace(trial, params=dict(exploit.params), takeovers=(*trial.takeovers, takeover)))
        return self._trials[trial.number]

    def tell(self, tune_id: str, value: float | None, error: bool) -> None:
        """The searcher is told of the trial's end."""
        trial = self._trials[self.number_of(tune_id)]
        if trial.told is None:
            self._events += 1
            self._keep(replace(trial, told=self._events, told_value=value, told_error=error))

    def end(self, number: int, status: TrialStatus, reason: str, value: float | None) -> None:
        """The trial is over, or this session of it. `value`: the best that its journal has, if that is known."""
        before = self.best
        trial = self._trials[number]
        best = trial.value if value is None or not math.isfinite(value) else value
        self._keep(replace(trial, status=status, reason=reason, value=best, ended=time.time()))
        if status.is_over:
            after = self.best
            gained = after is not None and (before is None or after.number != before.number or number == after.number)
            self.since_gain = 0 if gained else self.since_gain + 1

    def _keep(self, trial: TrialRecord) -> None:
        self._trials[trial.number] = trial
        self._store.save(trial)


def _events_of(trial: TrialRecord) -> Iterator[tuple[int, Event, Milestone | None]]:
    yield trial.suggested, "suggested", None
    for milestone in trial.milestones:
        yield milestone.event, "arrived", milestone
    if trial.told is not None:
        yield trial.told, "told", None
