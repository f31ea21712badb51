"""Reports of a trial of several workers on their way from rank 0 to Ray Tune, which is told in another process.

In: a report, from rank 0, which waits for the answer. Out: the report, for the trial's own process; then whether to go
on. Both sides may ask again after the hub has died: nothing is lost or told twice. Pure, but for waiting.
"""

from __future__ import annotations

import threading
from enum import StrEnum
from typing import Any

from ray_tracking.errors import RunFailedError

Number = tuple[int, int]
"""Attempt and count: grows over all reports of a run."""
FIRST: Number = (0, 0)


class Answer(StrEnum):
    """What rank 0 is told once Ray Tune has decided."""

    GO_ON = "go on"
    END = "end"


class Mailbox:
    """Of one trial. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._number = self._taken = FIRST
        self._report: Any = None
        self._ending = False
        self._ended = False
        self._failure: str | None = None

    def report(self, number: Number, report: Any, seconds: float) -> Answer | None:
        """Rank 0 has something to tell, or still has. The answer; None: not within `seconds`, ask again."""
        with self._changed:
            if number > self._number:
                self._number, self._report = number, report
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._ending or self._taken >= number, seconds)
            if self._ending:
                return Answer.END
            return Answer.GO_ON if self._taken >= number else None

    def next(self, after: Number, seconds: float) -> tuple[Number, Any] | None:
        """The report after that one, which Ray Tune has taken: rank 0 may go on. None: not within `seconds`.

        Raises RunFailedError once the trial was made to fail.
        """
        with self._changed:
            self._taken = max(self._taken, after)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._number > after or self._failure is not None, seconds)
            if self._failure is not None:
                raise RunFailedError(self._failure)
            return (self._number, self._report) if self._number > after else None

    def fail(self, reason: str) -> None:
        """The trial's own process is to end the workers, and to fail."""
        with self._changed:
            self._failure = reason
            self._changed.notify_all()

    def end(self, seconds: float) -> bool:
        """The trial ends. Waits until rank 0 says that all it was saving is written: whether it has."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._ended, seconds)

    def ended(self) -> None:
        """Rank 0 has nothing left to write."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    @property
    def is_waiting(self) -> bool:
        """Whether rank 0 waits for an answer."""
        with self._changed:
            return self._number > self._taken
