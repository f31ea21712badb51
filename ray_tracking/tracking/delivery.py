"""Fills one backend from the journal: a thread with a cursor, retries, a deadline and patience.

In: journal rows from the cursor on. Out: calls to a Backend, and a Cursor that says how far it got and why not further.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ray_tracking.errors import BackendError, BackendRefusedError, LeaseLostError, StorageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.log import get_logger
from ray_tracking.records import Kind, Record
from ray_tracking.storage import Storage
from ray_tracking.tracking.backends.base import Backend, BackendIdentity, RunInfo
from ray_tracking.tracking.collector import settle
from ray_tracking.tracking.cursor import BackendState, Cursor
from ray_tracking.tracking.patience import Patience
from ray_tracking.tracking.plan import Lineage, Span, cut, split_at_attempts
from ray_tracking.tracking.priority import wait_for_idle, wait_no_more
from ray_tracking.tracking.tail import Tail

log = get_logger()

_READ_ROWS = 2000
_PAUSE_SECONDS = 3.0
"""Between two calls to a backend that keeps up: backends cost by the call, so three seconds' rows go together."""
_SAVE_SECONDS = 5.0
_FLUSH_SECONDS = 10.0
_LEAST_RECORDS = 50
"""In one call, where more at once take a backend longer than its client waits."""
_QUIET_SECONDS = 60.0
"""One that fails again and again is not warned of more often."""
_TURN_SECONDS = 20.0
_TURN_LOOK_SECONDS = 0.1
_CLOSINGS = 3
"""Tries to close a backend."""
_FOREIGN = BaseException
"""What a backend may raise: it is foreign code, and all of it stays here, a cancelled task or a panic too."""

NOT_FOR_BACKENDS = frozenset({Kind.ATTEMPT, Kind.RANK_SCALAR})


class Delivery:
    """One backend of one run. `start`, then `finish` once no more rows come.

    `ended`: the journal is whole, so what a later attempt supersedes need not be shown to one that can't forget it.
    With `tries` it gives up after so many failures in a row, whatever `finish` says. `idle`: once the backend is open,
    its thread runs when the processor has nothing better to do. `check` raises LeaseLostError once another process
    writes the run (`Lease.check`): nothing more is shown or saved by this one then. The backend is not opened before
    `may_open()`, but for the run's end or after _TURN_SECONDS.
    """

    def __init__(
        self,
        backend: Backend,
        run: RunInfo,
        directory: Storage,
        tail: Tail,
        *,
        deadline: float = 60.0,
        ended: bool = False,
        tries: int | None = None,
        idle: bool = False,
        check: Callable[[], object] = lambda: None,
        may_open: Callable[[], bool] = lambda: True,
    ) -> None:
        self.cursor = Cursor.load(directory, backend.name)
        self._backend = backend
        self._kinds = backend.kinds - NOT_FOR_BACKENDS
        self._run = run
        self._directory = directory
        self._tail = tail
        # An own one: a reader is for one thread.
        self._reader = JournalReader(directory, strict=False, end=lambda: tail.next_offset)
        self._deadline = deadline
        self._ended = ended
        self._patience = Patience(tries)
        self._check = check
        self._may_open = may_open
        self._idle = idle
        self._lost = False
        self._lineage: Lineage | None = None
        self._opened = False
        self._closings = 0
        self._closed = False
        self._settled = False
        self._announced = False
        self._warned = -math.inf
        self._most = backend.max_records
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
        self._thread.start()

    def finish(self, status: str, end: float) -> None:
        """No more rows come: deliver what there is until the monotonic time `end`, then close the backend."""
        self._status = status
        self._end = end
        self._finishing.set()
        if self._idle and self._thread.is_alive() and self._thread.native_id is not None:
            wait_no_more(self._thread.native_id)
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
            self.cursor.error = self.cursor.error or f"cut off at its end: no answer for {waited:.0f} s"
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
        called, state = self._called, self.state
        if state.state is BackendState.HANGING:
            self._announce("backend hangs; training goes on", error=state.error)
            if self._called is not called:
                return  # the call has just come back
            self.cursor.state, self.cursor.error = state.state, state.error
            self._save()

    # --- the thread -------------------------------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        """Whether the thread has ended: all was delivered, or it has given up."""
        return not self._thread.is_alive()

    def _work(self) -> None:
        self._save()  # by the thread: whoever starts a run need not wait for the storage once per backend
        self._await_turn()
        while not self._is_over() and not self._has_given_up() and self._closings < _CLOSINGS:
            finishing = self._finishing.is_set()  # asked before the rows are: none may come in between unseen
            self._called = time.monotonic()
            try:
                more = self._step()
                if finishing and not more:
                    self._close()
            except BackendRefusedError as error:
                self._disable(error)
                return
            except LeaseLostError as error:
                self._stop(error)
                return
            except _FOREIGN as error:
                self._called = None
                self._fail(error)
                continue
            self._called = None
            self._recover()
            self.cursor.state, self.cursor.error = BackendState.OK, None
            if time.monotonic() - self._saved > _SAVE_SECONDS:
                self._save()
            if more:
                continue
            if finishing:
                break
            self._hurried.wait(_PAUSE_SECONDS)
            self._hurried.clear()
            self._tail.wait(self.cursor.offset, _SAVE_SECONDS, self._finishing.is_set)
        self._conclude()

    def _await_turn(self) -> None:
        end = time.monotonic() + _TURN_SECONDS
        while time.monotonic() < end and not self._may_open() and not self._finishing.wait(_TURN_LOOK_SECONDS):
            pass

    def _is_over(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    def _step(self) -> bool:
        """Open the backend if need be and deliver one read's worth. Returns whether there is more at once."""
        self._check()
        if not self._opened:
            self._open()
        if self._lineage is None:
            self._lineage = self._lineage_here()
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

    def _lineage_here(self) -> Lineage:
        here = self.cursor.offset
        self.cursor.spans = cut(self.cursor.spans, here)
        if self._ended and not self._backend.rewinds and here < self._tail.next_offset:
            self.cursor.spans.append(Span(here, self._tail.next_offset, self._tail.next_offset))
            self._save()  # before a row is left out because of it
        return Lineage.at(self._reader, here, self.cursor.spans)

    def _open(self) -> None:
        known = BackendIdentity(self.cursor.run_id, self.cursor.location or "") if self.cursor.run_id else None
        identity = self._backend.open(self._run, known)
        self.cursor.run_id, self.cursor.location = identity.run_id, identity.location
        held = self._backend.position()
        if held is None and known is not None and identity != known:
            held = -1  # another server, or its run was deleted there: what the cursor counts is not in this one
        if held is not None and held + 1 < self.cursor.offset:
            lacking = self.cursor.offset - held - 1
            log.info("backend lacks what it had been given; sending it again", backend=self._backend.name, rows=lacking)
            self.cursor.delivered = max(0, self.cursor.delivered - lacking)
            self.cursor.offset = held + 1
            self._lineage = None
        self._save()
        self._opened = True
        if not self._settled:
            settle()
            if self._idle:
                wait_for_idle()
                if self._finishing.is_set():
                    wait_no_more(threading.get_native_id())
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
        begin = 0
        while begin < len(rows):
            part = rows[begin : begin + self._most]
            wanted = [row for row in lineage.news(part) if row.kind in self._kinds]
            if wanted:
                self._check()
                self._backend.write(wanted)
                self._patience.succeeded()
                self._most = min(2 * self._most, self._backend.max_records)
            self._advance(part)
            begin += len(part)
            if self._is_over():
                return

    def _advance(self, rows: Sequence[Record]) -> None:
        self.cursor.offset = rows[-1].offset + 1
        self.cursor.delivered += len(rows)

    def _recover(self) -> None:
        if self._announced:
            log.info("backend answers again", backend=self._backend.name, failures=self._patience.failures)
            self._announced = False
        self._patience.succeeded()

    def _fail(self, error: BaseException) -> None:
        self._opened = False  # the contract: `open` is called again after a failure
        self.cursor.state, self.cursor.error = BackendState.FAILING, _reason(error)
        at_end = self._finishing.is_set()
        wait = self._patience.failed(time.monotonic(), getattr(error, "retry_after", None), at_end=at_end)
        self._most = max(self._most // 2, min(_LEAST_RECORDS, self._backend.max_records))
        said = "backend fails; training goes on and it is filled later"
        if self._announce(said, error=self.cursor.error, next_try_seconds=wait):
            self._save()
        if not at_end:
            self._finishing.wait(wait)
        if self._finishing.is_set() and not self._has_given_up():
            time.sleep(self._patience.last_pause(time.monotonic(), self._left(), failed_at_end=at_end))

    def _announce(self, event: str, **values: Any) -> bool:
        """Say it once for as long as it lasts. Returns whether it was new."""
        if self._announced:
            return False
        self._announced = True
        loudly = time.monotonic() - self._warned > _QUIET_SECONDS
        (log.warning if loudly else log.info)(event, backend=self._backend.name, **values)
        if loudly:
            self._warned = time.monotonic()
        return True

    def _left(self) -> float:
        """Seconds until the end that `finish` named."""
        return math.inf if self._end is None else self._end - time.monotonic()

    def _has_given_up(self) -> bool:
        return self._patience.is_exhausted(time.monotonic(), self._left() if self._finishing.is_set() else None)

    def _disable(self, error: BackendRefusedError) -> None:
        self._called = None
        self.cursor.state, self.cursor.error = BackendState.DISABLED, str(error)
        log.warning("backend disabled: it refuses for good", backend=self._backend.name, error=str(error))
        self._save()

    def _stop(self, error: LeaseLostError) -> None:
        self._called = None
        self._lost = True
        log.info("backend no longer filled by this process", backend=self._backend.name, error=str(error))

    def _save(self) -> None:
        """Write the cursor. If the storage does not take it now, that is said once and it is written next time."""
        if self._lost:
            return
        try:
            self._check()
            self.cursor.save(self._directory)
            self._unsaved = False
        except LeaseLostError:
            return  # the thread finds it too
        except StorageError as error:
            if not self._unsaved:
                log.warning("the cursor can't be saved; trying again", backend=self._backend.name, error=str(error))
            self._unsaved = True
        self._saved = time.monotonic()

    def _close(self) -> None:
        self._check()
        self._closings += 1
        self._backend.flush()
        self._backend.close(self._status or "interrupted")
        self._closed = True

    def _conclude(self) -> None:
        """The thread ends: say whether the backend has everything. One that was not closed may yet lose some of it."""
        if self._opened and not self._closed:
            self._called = time.monotonic()
            try:
                self._close()
            except LeaseLostError as error:
                self._stop(error)
                return
            except _FOREIGN as error:
                self.cursor.error = _reason(error)
            self._called = None
        complete = self._closed and self.cursor.offset >= self._tail.next_offset
        if not complete and self.cursor.error is None:
            self.cursor.error = "the run's end did not wait longer for it"
        self.cursor.state = BackendState.COMPLETE if complete else BackendState.PENDING
        self._save()


def _reason(error: BaseException) -> str:
    return str(error) if isinstance(error, BackendError) else f"{type(error).__name__}: {error}"
