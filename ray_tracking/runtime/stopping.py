"""A run that is asked to end early: when a training function is left, and what that is called. Pure.

Stopped is neither failed nor completed: the run goes on with `resume` from the checkpoint saved for it.
"""

from __future__ import annotations

STOPPED = "stopped"
"""What a worker returns to Ray for a run that was stopped; None for one that has ended by itself."""
GRACE_MEETINGS = 30
"""For so many meetings of the ranks, about a second each, a function that asks should_stop() is left to it."""


class TrainingStopped(BaseException):
    """Raised from `run.steps` and `run.epochs` on every rank at the same step, once the state is saved.

    Not an Exception: a training function that survives its own errors must not survive this.
    """


class Stopping:
    """What one rank knows of a stop. All ranks come to the same answers, as they ask at the same steps."""

    def __init__(self) -> None:
        self.told = False
        """`should_stop` has said yes."""
        self._asks = False

    def ask(self, requested: bool) -> bool:
        """The training function asks by itself."""
        self._asks = True
        self.told = self.told or requested
        return requested

    def must_leave(self, meetings: int, *, epoch_end: bool = False) -> bool:
        """Whether the function is left now, `meetings` after the ranks learnt of the stop (-1: they have not)."""
        return meetings >= 0 and (epoch_end or not self._asks or meetings >= GRACE_MEETINGS)
