"""A sweep that is asked to stop (`ray-tracking stop SWEEP`): no new trials, those under way save and end.

In: the request in the sweep's directory, seen by a thread, for the storage may be slow. Out: `Asked`, at which the
driver's other parts look.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ray_tracking.errors import StorageError
from ray_tracking.log import get_logger
from ray_tracking.runs import stopping
from ray_tracking.storage import Storage

log = get_logger()

STOPPED_BY_REQUEST = "stopped by request"
_SECONDS = 90.0
"""What trials have for their last checkpoint; longer than a step of the longest."""


class Asked:
    """`tell_trials` is called once, from another thread."""

    def __init__(self, directory: Storage, tell_trials: Callable[[], object]) -> None:
        self._directory = directory
        self._tell_trials = tell_trials
        self._since: float | None = None
        self._over = threading.Event()

    def __bool__(self) -> bool:
        return self._since is not None

    @property
    def is_late(self) -> bool:
        """Whether trials have had their time."""
        return self._since is not None and time.monotonic() - self._since >= _SECONDS

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look for a request between `with` and its end."""
        looking = threading.Thread(target=self._look, name="ray-tracking-asked", daemon=True)
        looking.start()
        try:
            yield
        finally:
            self._over.set()
            looking.join(stopping.poll_seconds(self._directory))

    def _look(self) -> None:
        while not self._over.wait(stopping.poll_seconds(self._directory)):
            try:
                found = stopping.requested(self._directory)
            except StorageError as error:
                log.warning("the storage does not say whether the sweep is to stop", error=error.message)
                continue
            if found is not None:
                log.info("asked to stop: the trials under way save a last checkpoint", by=found.by)
                self._since = time.monotonic()
                self._tell_trials()
                return
