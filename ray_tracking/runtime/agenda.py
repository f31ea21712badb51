"""What only rank 0 sees in time (the clock, a preemption, a request to stop), told to all ranks at the same step.

The ranks meet for it about once a second, whatever a step takes: rank 0 says with each answer after how many steps
they meet next.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from ray_tracking.runtime.collective import broadcast_number

_SECONDS = 1.0
_MOST_STEPS = 1000
TIMED, PREEMPTED, STOP = 1, 2, 4
_FLAGS = 8


class Agenda:
    """`look` gives rank 0's flags (TIMED | PREEMPTED | STOP); it is called on rank 0 alone."""

    def __init__(self, look: Callable[[], int]) -> None:
        self._look = look
        self._left = 1
        self._steps = 1
        self._before: float | None = None
        self._flags = 0
        self.meetings_since_stop = -1
        """Meetings after the one at which the ranks learnt that training is to end early; -1: they have not."""

    def after_step(self) -> None:
        """To be called by all ranks after each step; they meet when it is time."""
        self._left -= 1
        if self._left > 0:
            return
        now = time.monotonic()
        answer = broadcast_number(self._look() + _FLAGS * self._steps_until(now))
        self._before, self._steps = now, answer // _FLAGS
        self._left = self._steps
        self._flags |= answer % _FLAGS
        if self.stop:
            self.meetings_since_stop += 1

    @property
    def stop(self) -> bool:
        """Whether training is to end early."""
        return bool(self._flags & STOP)

    def take(self) -> tuple[bool, bool]:
        """(a save is due by the clock, the machine is being taken away), each told once."""
        flags, self._flags = self._flags, self._flags & STOP
        return bool(flags & TIMED), bool(flags & PREEMPTED)

    def _steps_until(self, now: float) -> int:
        """How many steps take about a second, by what they took since the last meeting; at most twice as many."""
        if self._before is None:
            return 1
        seconds = max(now - self._before, 1e-6)
        return max(1, min(int(self._steps * _SECONDS / seconds), 2 * self._steps, _MOST_STEPS))
