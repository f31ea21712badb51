"""Fills one backend from the journal: a thread with a cursor, retries, a deadline and patience.

In: journal rows from the cursor on. Out: calls to a Backend, and a Cursor that says how far it got and why not further.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from ray_tracking.errors import BackendError, BackendRefusedError, StorageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.log import get_logger
from ray_tracking.records import Kind, Record
from ray_tracking.storage import Storage
from ray_tracking.tracking.backends.base import Backend, BackendIdentity, RunInfo
from ray_tracking.tracking.collector import settle
from ray_tracking.tracking.cursor import BackendState, Cursor
from ray_tracking.tracking.plan import Lineage, split_at_attempts
from ray_tracking.tracking.tail import Tail

log = get_logger()

_READ_ROWS = 2000
_PAUSE_SECONDS = 2.0
"""Between two calls to a backend that keeps up: backends cost by the call, so two seconds' rows go together."""
_LAST_PAUSE_SECONDS = 1.0
"""At most this long between the last tries, when the run ends."""
_SAVE_SECONDS = 5.0
_FLUSH_SECONDS = 10.0
_LONGEST_WAIT_SECONDS = 60.0
_LAST_TRIES = 3

NOT_FOR_BACKENDS = frozenset({Kind.ATTEMPT, Kind.RANK_SCALAR})


def retry_wait(failures: int, retry_after: float | None) -> float:
    """Seconds until the next try after `failures` failures in a row: 1, 2, 4 ... 60, or what the backend asked for."""
    doubled = float(min(2 ** (failures - 1), _LONGEST_WAIT_SECONDS)) if failures < 8 else _LONGEST_WAIT_SECONDS
    return doubled if retry_after is None else max(retry_after, doubled)


class Delivery:
    """One backend of one run. `start`, then `finish` once no more rows come."""

    def __init__(
        self, backend: Backend, run: RunInfo, directory: Storage, tail: Tail, *, deadline: float = 60.0
    ) -> None:
        self.cursor = Cursor.load(directory, backend.name)
        self._backend = backend
        self._kinds = backend.kinds - NOT_FOR_BACKENDS
        self._run = run
        self._directory = directory
        self._tail = tail
        self._reader = JournalReader(directory, strict=False)  # an own one: a reader is for one thread
        self._deadline = deadline
        self._lineage: Lineage | None = None
        self._opened = False
        self._settled = False
        self._failures = 0
        self._failures_at_end = 0
        self._down_at_end = False
        self._called: float | None = None
        self._saved = self._flushed = time.monotonic()
        self._unsaved = False
        self._end: float | None = None
        self._status: str | None = None
        self._finishing = threading.Event()
        self._hurried = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"deliver-{backend.name}", daemon=True)

    def start(self) -> None:
        unsupported = sorted(kind.value for kind in set(Kind) - self._kinds - NOT_FOR_BACKENDS)
        if unsupported:
            log.info("backend shows only some kinds", backend=self._backend.name, not_shown=unsupported)
        self.cursor = replace(self.cursor, state=BackendState.STARTING, error=None, unsupported=unsupported)
        self._save()
        self._thread.start()

    def finish(self, status: str, end: float) -> None:
        """No more rows come: deliver what there is until the monotonic time `end`, then close the backend."""
        self._status = status
        self._end = end
        self._finishing.set()
        self.hurry()
        self._tail.wake()

    def hurry(self) -> None:
        """Someone waits for what the journal has now: make no pause before the next call."""
        self._hurried.set()

    def join(self, timeout: float) -> Cursor:
        """Wait for the thread, at most `timeout` seconds; returns (and saves) how it stands after that."""
        self._thread.join(max(timeout, 0.0))
        if self._thread.is_alive():
            called = self._called
            waited = 0.0 if called is None else time.monotonic() - called
            # In place: the thread may be moving the offset on just now.
            self.cursor.error = self.cursor.error or f"no answer for {waited:.0f} s when the run ended"
            self.cursor.state = BackendState.PENDING
            self._save()
        return self.cursor

    @property
    def state(self) -> Cursor:
        """The cursor, with `hanging` if a call to the backend has not come back within the deadline."""
        called = self._called
        waited = 0.0 if called is None else time.monotonic() - called
        if waited <= self._deadline or self.cursor.state is BackendState.PENDING:
            return self.cursor
        return replace(self.cursor, state=BackendState.HANGING, error=f"no answer for {waited:.0f} s")

    def save_if_hanging(self) -> None:
        """Write what the thread itself can't write while it hangs. For another thread, every few seconds."""
        state = self.state
        if state.state is BackendState.HANGING:
            if self.cursor.state is not BackendState.HANGING:
                log.warning("backend hangs; training goes on", backend=self._backend.name, error=state.error)
            self.cursor.state, self.cursor.error = state.state, state.error
            self._save()

    # --- the thread -------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while not self._is_over() and not self._has_given_up():
            finishing = self._finishing.is_set()  # asked before the rows are: none may come in between unseen
            self._called = time.monotonic()
            try:
                more = self._step()
            except BackendRefusedError as error:
                self._disable(error)
                return
            except Exception as error:  # noqa: BLE001 - a backend is foreign code: whatever it raises stays here
                self._called = None
                self._fail(error)
                continue
            self._called = None
            self._down_at_end = False
            if self._failures:
                log.info("backend answers again", backend=self._backend.name, failures=self._failures)
                self._failures = 0
            self.cursor.state, self.cursor.error = BackendState.OK, None
            if time.monotonic() - self._saved > _SAVE_SECONDS:
                self._save()
            if more:
                continue
            if finishing:
                break
            self._hurried.wait(_PAUSE_SECONDS)
            self._hurried.clear()
            if not self._finishing.is_set():
                self._tail.wait(self.cursor.offset, _SAVE_SECONDS)
        self._close()

    def _is_over(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    def _step(self) -> bool:
        """Open the backend if need be and deliver one read's worth. Returns whether there is more at once."""
        if not self._opened:
            self._open()
        if self._lineage is None:
            self._lineage = Lineage.at(self._reader, self.cursor.offset)
        rows = self._tail.read(self.cursor.offset, _READ_ROWS)
        if rows is None:
            rows = self._reader.read(self.cursor.offset, _READ_ROWS)
        for part in split_at_attempts(rows):
            self._deliver(part, self._lineage)
            if self._is_over():
                return False
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._backend.flush()
            self._flushed = time.monotonic()
        at_once = len(rows) == _READ_ROWS or self._finishing.is_set()
        return at_once and bool(rows) and self.cursor.offset < self._tail.next_offset

    def _open(self) -> None:
        known = BackendIdentity(self.cursor.run_id, self.cursor.location or "") if self.cursor.run_id else None
        identity = self._backend.open(self._run, known)
        self.cursor.run_id, self.cursor.location = identity.run_id, identity.location
        held = self._backend.position()
        if held is not None and held + 1 < self.cursor.offset:
            log.info(
                "backend lacks what its client had taken; sending it again",
                backend=self._backend.name,
                rows=self.cursor.offset - held - 1,
            )
            self.cursor.delivered = max(0, self.cursor.delivered - (self.cursor.offset - held - 1))
            self.cursor.offset = held + 1
            self._lineage = None
        self._save()
        self._opened = True
        if not self._settled:
            settle()
            self._settled = True

    def _deliver(self, rows: Sequence[Record], lineage: Lineage) -> None:
        """Rows of one attempt, the attempt's own row alone. The cursor moves with every call that succeeded."""
        if rows[0].kind is Kind.ATTEMPT:
            if rows[0].attempt > 1:
                if self._backend.rewinds:
                    self._backend.rewind(rows[0].step)
                lineage.begin(self._reader, rows[0], rewinds=self._backend.rewinds)
            self._advance(rows)
            return
        lineage.go_on(self._reader, rows[0].attempt, rewinds=self._backend.rewinds)
        for i in range(0, len(rows), self._backend.max_records):
            part = rows[i : i + self._backend.max_records]
            wanted = [row for row in lineage.news(part) if row.kind in self._kinds]
            if wanted:
                self._backend.write(wanted)
            self._advance(part)
            if self._is_over():
                return

    def _advance(self, rows: Sequence[Record]) -> None:
        self.cursor.offset = rows[-1].offset + 1
        self.cursor.delivered += len(rows)

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        self._opened = False  # the contract: `open` is called again after a failure
        self.cursor.state = BackendState.FAILING
        self.cursor.error = str(error) if isinstance(error, BackendError) else f"{type(error).__name__}: {error}"
        wait = retry_wait(self._failures, getattr(error, "retry_after", None))
        if self._failures == 1:
            log.warning(
                "backend fails; training goes on and it is filled later",
                backend=self._backend.name,
                error=self.cursor.error,
                next_try_seconds=wait,
            )
            self._save()
        if self._finishing.is_set():
            self._failures_at_end += 1
            left = (self._end or 0.0) - time.monotonic()
            time.sleep(max(min(wait, left, _LAST_PAUSE_SECONDS), 0.0))
        else:
            self._finishing.wait(wait)
            self._down_at_end = True

    def _has_given_up(self) -> bool:
        """A backend that was down before the run ended is not waited for as long as one that was up."""
        return self._down_at_end and self._failures_at_end >= _LAST_TRIES

    def _disable(self, error: BackendRefusedError) -> None:
        self._called = None
        self.cursor.state, self.cursor.error = BackendState.DISABLED, str(error)
        log.warning("backend disabled: it refuses for good", backend=self._backend.name, error=str(error))
        self._save()

    def _save(self) -> None:
        """Write the cursor. If the storage does not take it now, that is said once and it is written next time."""
        try:
            self.cursor.save(self._directory)
            self._unsaved = False
        except StorageError as error:
            if not self._unsaved:
                log.warning("the cursor can't be saved; trying again", backend=self._backend.name, error=str(error))
            self._unsaved = True
        self._saved = time.monotonic()

    def _close(self) -> None:
        complete = self.cursor.offset >= self._tail.next_offset
        if not complete and self.cursor.error is None:
            self.cursor.error = "the run's end did not wait longer for it"
        try:
            if self._opened:
                self._called = time.monotonic()
                self._backend.flush()
                self._backend.close(self._status or "interrupted")
        except Exception as error:  # noqa: BLE001 - as in _work
            complete = False
            self.cursor.error = str(error) if isinstance(error, BackendError) else f"{type(error).__name__}: {error}"
        self._called = None
        self.cursor.state = BackendState.COMPLETE if complete else BackendState.PENDING
        self._save()
