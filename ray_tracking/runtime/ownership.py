"""The driver's ownership of its run: taken before Ray is reached, kept while it trains, given back at the end.

In: the run's directory. Out: a ticket for the tracker, and training that is aborted once another driver has taken over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_tracking.errors import LeaseLostError
from ray_tracking.log import get_logger
from ray_tracking.runs.lease import Lease, LeaseKeeper, acquire
from ray_tracking.storage import Storage

log = get_logger()


class Ownership:
    """Made by `own`. `ticket` is what the tracker joins with."""

    def __init__(self, lease: Lease) -> None:
        self.check = lease.check
        """Raises LeaseLostError once another process owns the run, StorageError if that can't be known."""
        self.ticket = lease.ticket
        self._lock = threading.Lock()
        self._abort: Callable[[], object] | None = None

    @contextmanager
    def aborting(self, abort: Callable[[], object]) -> Iterator[None]:
        """Inside the block `abort` is called, on another thread, if the ownership is lost."""
        self.check()
        with self._lock:
            self._abort = abort
        try:
            yield
        finally:
            with self._lock:
                self._abort = None

    def lose(self, error: LeaseLostError) -> None:
        log.error("training is aborted: another process writes the run", error=str(error))
        with self._lock:
            abort = self._abort
        if abort is not None:
            abort()


@contextmanager
def own(run: Storage, seconds: float) -> Iterator[Ownership]:
    """Own the run whose directory `run` is inside the block. Raises LeaseHeldError at once if another process does.

    `seconds` without a sign of life, and others may take over.
    """
    lease = acquire(run, duration=seconds)
    owner = Ownership(lease)
    with LeaseKeeper(lease, owner.lose):
        yield owner
