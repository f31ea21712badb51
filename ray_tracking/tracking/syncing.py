"""Fills the backends of a run that has ended from its journal: what they lack, and nothing twice.

In: a run on the storage, which backends, settings. Out: an `Outcome` per backend. It holds the run's lease meanwhile.
"""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from ray_tracking.config import ExperimentTrackingConfig
from ray_tracking.errors import LeaseHeldError, RefusedError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.runs.lease import LeaseKeeper, acquire
from ray_tracking.runs.lease_files import seats
from ray_tracking.runs.record import RunRecord, Status
from ray_tracking.runs.store import DEFAULT_STORAGE, RunStore
from ray_tracking.storage import Storage
from ray_tracking.tracking.backends.base import Backend, RunInfo
from ray_tracking.tracking.cursor import BackendState, Cursor
from ray_tracking.tracking.delivery import Delivery
from ray_tracking.tracking.factory import UnavailableBackend, create_backends
from ray_tracking.tracking.spec import local_directory
from ray_tracking.tracking.tail import Tail

_TRIES = 4
"""With the waits between them seven seconds: someone is looking on, and can call again."""
_DEADLINES = 5.0
"""Times as patient with one call as a run: W&B's last one waits until all of it is uploaded."""
_LOOK_SECONDS = 0.1
_END_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a backend stands after it. `delivered`: journal rows this time; `pending`: those it still lacks."""

    backend: str
    state: BackendState
    delivered: int
    pending: int
    error: str | None
    location: str | None

    @property
    def is_complete(self) -> bool:
        return self.state is BackendState.COMPLETE


Progress = Callable[[int, int], object]
"""Called a few times a second with (rows delivered so far, rows to deliver)."""


def sync(
    store: RunStore,
    record: RunRecord,
    tracking: ExperimentTrackingConfig,
    *,
    looks_alive: bool = False,
    touched: Iterable[str] = (),
    again: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[Outcome]:
    """Fill every backend that `tracking` switches on. Blocks; one that fails or hangs does not hold up the others.

    `looks_alive`: whether the run says that it is running and shows signs of life; asked where it has no lease.
    `touched` backends are looked at even if they are complete, `again` sends all of it, whatever their cursors say.
    Raises RefusedError for a run that is alive.
    """
    directory = store.directory(record.run_id)
    if looks_alive and next(seats(directory), None) is None:
        raise _refusal(store, record.run_id, "shows signs of life")
    try:
        lease = acquire(directory)
    except LeaseHeldError as error:
        raise _refusal(store, record.run_id, f"is being written by {error.process or 'a process'}") from error
    with LeaseKeeper(lease):
        next_offset = JournalReader(directory, strict=False).next_offset
        sides = [
            _Side(directory, backend, next_offset, always=again or backend.name in set(touched), again=again)
            for backend in create_backends(tracking)
        ]
        try:
            for side in sides:
                deadline = _DEADLINES * tracking.delivery.deadline_secs
                side.start(_info(store, record), _last_status(record), deadline, lease.check)
            while not all(side.is_done for side in sides):
                progress(sum(side.delivered for side in sides), sum(side.wanted for side in sides))
                time.sleep(_LOOK_SECONDS)
        finally:
            outcomes = [side.end() for side in sides]
        lease.check()  # a cursor that was saved after another process had taken over may be wrong
    progress(sum(side.delivered for side in sides), sum(side.wanted for side in sides))
    return outcomes


class _Side:
    """One backend: nothing to do, not to be had here, or a Delivery."""

    def __init__(
        self, directory: Storage, backend: Backend | UnavailableBackend, next_offset: int, *, always: bool, again: bool
    ) -> None:
        self._directory = directory
        self._backend = backend
        self._next = next_offset
        self._cursor = Cursor.load(directory, backend.name)
        if again:
            self._cursor = replace(self._cursor, offset=0, delivered=0)
        self._before = self._cursor.delivered
        self._delivery: Delivery | None = None
        complete = self._cursor.state is BackendState.COMPLETE and self._cursor.offset >= next_offset
        self._idle = complete and not always
        self.wanted = 0 if self._idle or isinstance(backend, UnavailableBackend) else next_offset - self._cursor.offset

    def start(self, run: RunInfo, status: str, deadline: float, check: Callable[[], object]) -> None:
        if self._idle:
            return
        if isinstance(self._backend, UnavailableBackend):
            error = f"{self._backend.reason} {self._backend.hint}"
            self._cursor = replace(self._cursor, state=BackendState.UNAVAILABLE, error=error)
            self._cursor.save(self._directory)
            return
        self._cursor.save(self._directory)
        tail = Tail(self._next)
        self._delivery = Delivery(
            self._backend, run, self._directory, tail, deadline=deadline, ended=True, tries=_TRIES, check=check
        )
        self._delivery.start()
        self._delivery.finish(status, math.inf)

    @property
    def delivered(self) -> int:
        if self._delivery is not None:
            # What the backend turned out to lack is sent again, though it was counted before.
            return max(self._delivery.cursor.delivered - self._before, 0)
        return 0

    @property
    def is_done(self) -> bool:
        delivery = self._delivery
        return delivery is None or delivery.is_done or delivery.state.state is BackendState.HANGING

    def end(self) -> Outcome:
        cursor = self._cursor if self._delivery is None else self._delivery.join(_END_SECONDS)
        pending = max(0, self._next - cursor.offset)
        return Outcome(cursor.backend, cursor.state, self.delivered, pending, cursor.error, cursor.location)


def sync_command(run_id: str, storage: str) -> str:
    """The command that fills what backends lack, to be copied. `storage`: URI of the place where runs lie."""
    return _command("sync", run_id, storage)


def _command(verb: str, run_id: str, storage: str) -> str:
    place = "" if storage == os.path.abspath(DEFAULT_STORAGE) else f" --storage {shlex.quote(storage)}"
    return f"ray-tracking {verb} {shlex.quote(run_id)}{place}"


def _refusal(store: RunStore, run_id: str, why: str) -> RefusedError:
    return RefusedError(
        f"The run {run_id!r} {why}: its own tracker fills the backends while it runs.",
        hint=f"See how they stand: {_command('status', run_id, store.storage.uri)}\nOnce it has ended, sync it again.",
    )


def _info(store: RunStore, record: RunRecord) -> RunInfo:
    return RunInfo(
        record.run_id,
        record.name,
        record.config,
        record.tags,
        local_directory(store.storage),
        store.directory(record.run_id).child("artifacts").uri,
        record.created,
        record.ended,
    )


def _last_status(record: RunRecord) -> str:
    return (record.status if record.status.is_final else Status.INTERRUPTED).value
