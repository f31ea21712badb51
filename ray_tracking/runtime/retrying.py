"""Whether a run that has ended is started again, and after how long. Pure: no clock, no storage, no ray.

In: how a try ended, how many have failed since the last progress, the budget. Out: a `Verdict`.
The budget (`--retries N`) is of tries in a row without progress: a run that gets further is never given up.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

FIRST_WAIT_SECONDS = 2.0
LONGEST_WAIT_SECONDS = 60.0


class Ending(StrEnum):
    """How one try ended. `lost`: its driver, head or cluster is gone, and nobody said how training stood.

    `stopped`: somebody asked for it (`stop`, Ctrl-C). `refused`: it can't work as it was asked for (exit status 2
    or 3), so that another try would only be refused again.
    """

    COMPLETED = "completed"
    FAILED = "failed"
    LOST = "lost"
    STOPPED = "stopped"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`wait` is in seconds before the next start; `failures` counts this try, to be given to the next `decide`."""

    again: bool
    wait: float
    failures: int
    why: str
    """For people: why it is given up, or which try in the budget comes next."""


def decide(ending: Ending, *, retries: int, failures: int = 0, progressed: bool = False) -> Verdict:
    """What to do after a try.

    `retries`: starts allowed in a row without progress. `failures`: those that failed since the last progress, without
    this one. `progressed`: whether this try got further than any before it, as a checkpoint shows.
    """
    if ending not in (Ending.FAILED, Ending.LOST):
        return Verdict(False, 0.0, failures, f"it was {ending.value}")
    failed = 1 if progressed else failures + 1
    if failed > retries:
        times = f"{failed} times in a row without progress" if failed > 1 else "once"
        return Verdict(False, 0.0, failed, f"it failed {times}; --retries {retries} allows no further try")
    return Verdict(True, back_off(failed), failed, f"try {failed} of {retries} without progress")


def back_off(failures: int) -> float:
    """Seconds to wait after so many failures in a row: doubled each time, bounded."""
    doublings = min(max(failures, 1) - 1, 16)
    return float(min(FIRST_WAIT_SECONDS * 2**doublings, LONGEST_WAIT_SECONDS))
