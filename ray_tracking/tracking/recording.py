"""The record of a run, `run.json`, as its tracker keeps it: loaded or begun, changed in order, written under the lease.

In: a spec, a hold on the run. Out: the record as it is now, on storage too as soon as that takes it. Thread-safe.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

from ray_tracking.errors import RefusedError, StorageError
from ray_tracking.log import get_logger
from ray_tracking.runs.record import RunRecord, Status
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.versions import installed_versions
from ray_tracking.tracking.hold import Hold
from ray_tracking.tracking.spec import TrackerSpec

log = get_logger()


class RecordKeeper:
    """Raises RefusedError if the run is completed. Every change raises LeaseLostError if another process writes it.

    `workers`: if the run is new, its first attempt begins with it, with so many workers: one write for both.
    """

    def __init__(self, runs: RunStore, spec: TrackerSpec, hold: Hold, workers: int | None = None) -> None:
        self._runs = runs
        self._hold = hold
        self._lock = threading.Lock()
        self._unsaved = False
        self._ahead: int | None = None
        """Workers of the attempt that has begun before it was asked for."""
        self.record = self._load_or_create(spec, workers)

    def _load_or_create(self, spec: TrackerSpec, workers: int | None) -> RunRecord:
        if self._runs.exists(spec.run_id):
            record = self._runs.load(spec.run_id)
            if record.status is Status.COMPLETED:
                raise RefusedError(
                    f"The run {record.run_id!r} is completed; its history is not written on.",
                    hint="Choose another run id, or leave it out for a new one.",
                )
            return replace(record, status=Status.RUNNING)
        record = spec.new_record(time.time(), installed_versions())
        if workers is not None:
            record = record.begin_attempt(time.time(), workers)
            self._ahead = workers
        self._save(record)
        return record

    def begin_attempt(self, workers: int) -> int:
        """The number of the attempt that begins, which is on storage."""
        if self._ahead != workers:
            self.commit(lambda record: record.begin_attempt(time.time(), workers))
        self._ahead = None
        return self.record.attempts[-1].number

    def commit(self, change: Callable[[RunRecord], RunRecord]) -> RunRecord:
        """Change the record and write it; if this raises, StorageError say, nothing has changed."""
        with self._lock:
            record = change(self.record)
            self._save(record)
            self.record = record
            self._unsaved = False
        return record

    def change(self, change: Callable[[RunRecord], RunRecord]) -> None:
        """Change the record. If the storage does not take it now, `repair` or the next change writes it."""
        with self._lock:
            self.record = change(self.record)
            self._try_to_save()

    def repair(self) -> None:
        """Write run.json if it could not be, or if a process that was shut out has written its own over it late."""
        with self._lock:
            if self._unsaved or not (self._hold.is_first or self._runs.holds(self.record)):
                self._try_to_save()

    def _try_to_save(self) -> None:
        try:
            self._save(self.record)
            self._unsaved = False
        except StorageError as error:
            self._unsaved = True
            log.warning("run.json can't be saved; trying again", error=str(error))

    def _save(self, record: RunRecord) -> None:
        self._hold.check()
        self._runs.save(record)
        self._hold.check()
