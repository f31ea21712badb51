"""The tracker stands back: training has the processor, the tracker what is left of it."""

from __future__ import annotations

import os
from contextlib import suppress

_NICENESS = 19


def stand_back() -> None:
    """For the calling thread and all that it starts from now on.

    The least share of the processor, and (SCHED_BATCH) none that is taken from a running worker the moment there is
    something to do: it comes when a worker waits for its peers. Its share stays its own, so that on a full machine it
    is slow, but never stands still; SCHED_IDLE, measured, let appends wait for seconds there.
    """
    os.nice(_NICENESS)
    if hasattr(os, "SCHED_BATCH"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
