"""How far a run has come, from its journal alone, while it is trained.

In: the run's directory. Out: the step reached and whether training is under way.
"""

from __future__ import annotations

import time

from ray_tracking.journal.lineage import STEPLESS
from ray_tracking.journal.reader import JournalReader
from ray_tracking.records import Kind, Record
from ray_tracking.storage import Storage


class Follower:
    """Reads what is new at each `update`."""

    def __init__(self, directory: Storage) -> None:
        self.step = 0
        """The highest step of the newest attempt that logged one."""
        self.attempt = 0
        self.is_training = False
        """Whether a step was logged since the last `mark`."""
        self.changed = time.monotonic()
        """When something was last new."""
        self._reader = JournalReader(directory)
        self._offset = 0
        self._least_attempt = 0
        self._began = 0.0, 0
        self._latest = 0.0

    def update(self) -> None:
        while rows := self._reader.read(self._offset):
            self._offset = rows[-1].offset + 1
            self.changed = time.monotonic()
            for row in rows:
                self._take(row)

    @property
    def seconds_per_step(self) -> float:
        """By what the newest attempt has logged so far, by the clock of its worker; 0 while it is unknown."""
        steps = self.step - self._began[1]
        return max(0.0, self._latest - self._began[0]) / steps if steps > 0 else 0.0

    def _take(self, row: Record) -> None:
        if row.kind is Kind.ATTEMPT or row.kind in STEPLESS or row.step < 1:
            return
        if row.attempt > self.attempt:
            self.attempt, self.step = row.attempt, 0
            self._began = row.time, row.step
        if row.attempt == self.attempt and row.step > self.step:
            self.step, self._latest = row.step, row.time
        self.is_training = self.is_training or row.attempt >= self._least_attempt

    def mark(self, *, new_attempt: bool) -> None:
        """Forget that training is under way, until it has logged a step: of a `new_attempt`, if one must come."""
        self.update()
        self._least_attempt = self.attempt + new_attempt
        self.is_training = False
        self.changed = time.monotonic()
