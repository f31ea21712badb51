"""The tracker stands back: training has the processor, the tracker what is left of it."""

from __future__ import annotations

import os
from contextlib import suppress

_NICENESS = 19
_WORKERS_NICENESS = 10
"""From here on workers weigh so little (110 at most, 36 at Ray's 15) that an idle thread's 3 is still a share."""


def stand_back() -> bool:
    """For the calling thread and all that it starts from now on.

    The least share of the processor, and (SCHED_BATCH) none that is taken from a running worker the moment there is
    something to do: it comes when a worker waits for its peers. Its share stays its own, so that on a full machine it
    is slow, but never stands still; SCHED_IDLE, measured, let appends wait for seconds there.

    Returns whether threads that nobody waits for may stand back further, `wait_for_idle`: where the thread was as nice
    as Ray's workers are. Beside training at niceness 0 they would stand still.
    """
    before = os.nice(0)
    os.nice(_NICENESS)
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    return before >= _WORKERS_NICENESS


def wait_no_more(thread: int) -> None:
    """Somebody waits now for a thread of this process, by its native id: it stands back no further than the others.

    Where that takes a right that the user lacks (RLIMIT_NICE, CAP_SYS_NICE), it stays behind all that runs here.
    """
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):
            os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


def wait_for_idle() -> None:
    """For the calling thread and all that it starts from now on: run when a worker waits for its peers.

    Of a core that is never idle it still has a twelfth, beside one of Ray's workers (weights 3 and 36).
    """
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
