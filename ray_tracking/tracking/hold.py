"""The tracker process's hold on its run: the lease it writes under, renewed on a thread, asked before each write.

In: the run's directory and the ticket of the driver that owns it; without one the process becomes the owner itself.
Out: `check`, to be called before and after each write; `lost`, once another process has taken over.
"""

from __future__ import annotations

from ray_tracking.errors import LeaseLostError
from ray_tracking.journal.segments import Term
from ray_tracking.log import get_logger
from ray_tracking.runs.lease import LeaseKeeper, acquire, join
from ray_tracking.storage import Storage
from ray_tracking.tracking.spec import TrackerSpec

log = get_logger()


class Hold:
    """Taken when it is made. Raises LeaseHeldError, LeaseLostError or StorageError then."""

    def __init__(self, run: Storage, spec: TrackerSpec) -> None:
        if spec.lease is None:
            self._lease = acquire(run, duration=spec.lease_secs, patience=spec.patience)
        else:
            self._lease = join(run, spec.lease)
        self.check = self._lease.check
        """Raises LeaseLostError if this process must write no more, StorageError if that can't be known."""
        self._keeper = LeaseKeeper(self._lease, _say)
        self._keeper.__enter__()

    @property
    def term(self) -> Term:
        """What this writer's journal segments are known by."""
        return self._lease.seat

    @property
    def is_first(self) -> bool:
        """Whether no other process can have written the run before."""
        return self._lease.seat.epoch == 1 and self._lease.seat.number <= 1

    @property
    def lost(self) -> LeaseLostError | None:
        """As far as this process has noticed: within a third of the lease's duration, or at the next write."""
        return self._lease.lost

    def release(self) -> None:
        """Give it back; nothing may be written after it. May be repeated."""
        self._keeper.__exit__()


def _say(error: LeaseLostError) -> None:
    log.error("this tracker takes and delivers no more records: another process writes the run", error=str(error))
