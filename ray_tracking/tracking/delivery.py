"""Fills one backend from the journal: a thread with a cursor, retries, a deadline and patience.

In: journal rows from the cursor on. Out: calls to a Backend, and a Cursor that says how far it got and why not further.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from ray_tracking.errors import BackendError, BackendRefusedError
from ray_tracking.log import get_logger
from ray_tracking.records import Kind, Record
from ray_tracking.storage import Storage
from ray_tracking.tracking.backends.base import Backend, BackendIdentity, RunInfo
from ray_tracking.tracking.cursor import BackendState, Cursor
from ray_tracking.tracking.tail import Tail

log = get_logger()

_READ_ROWS = 2000
_PAUSE_SECONDS = 1.0
"""Between two calls to a backend that keeps up: backends cost by the call, so a second's rows go together."""
_SAVE_SECONDS = 5.0
_FLUSH_SECONDS = 10.0
_LONGEST_WAIT_SECONDS = 60.0

Point = tuple[Kind, str, int, int]


def retry_wait(failures: int, retry_after: float | None) -> float:
    """Seconds until the next try after `failures` failures in a row: 1, 2, 4 ... 60, or what the backend asked for."""
    doubled = float(min(2 ** (failures - 1), _LONGEST_WAIT_SECONDS)) if failures < 8 else _LONGEST_WAIT_SECONDS
    return doubled if retry_after is None else max(retry_after, doubled)


@dataclass(slots=True)
class _Replay:
    """Which points a backend that can't rewind has been shown, per attempt, so that none is shown twice."""

    attempt: int = 0
    shown: frozenset[Point] = frozenset()

    def is_repeat(self, record: Record) -> bool:
        return (record.kind, record.key, record.step, record.rank) in self.shown


class Delivery:
    """One backend of one run. `start`, then `finish` once no more rows come."""

    def __init__(
        self,
        backend: Backend,
        run: RunInfo,
        directory: Storage,
        tail: Tail,
        resumed_step: Callable[[int], int],
        deadline: float,
    ) -> None:
        self.cursor = Cursor.load(directory, backend.name)
        self._backend = backend
        self._run = run
        self._directory = directory
        self._tail = tail
        self._resumed_step = resumed_step
        self._deadline = deadline
        self._replay = _Replay()
        self._opened = False
        self._failures = 0
        self._called: float | None = None
        self._saved = self._flushed = time.monotonic()
        self._end: float | None = None
        self._status: str | None = None
        self._finishing = threading.Event()
        self._thread = threading.Thread(target=self._work, name=f"deliver-{backend.name}", daemon=True)

    def start(self) -> None:
        unsupported = sorted(kind.value for kind in set(Kind) - self._backend.kinds - {Kind.ATTEMPT})
        if unsupported:
            log.info("backend shows only some kinds", backend=self._backend.name, not_shown=unsupported)
        self.cursor = replace(self.cursor, state=BackendState.STARTING, error=None, unsupported=unsupported)
        self.cursor.save(self._directory)
        self._thread.start()

    def finish(self, status: str, end: float) -> None:
        """No more rows come: deliver what there is until the monotonic time `end`, then close the backend."""
        self._status = status
        self._end = end
        self._finishing.set()
        self._tail.wake()

    def join(self, timeout: float) -> Cursor:
        """Wait for the thread, at most `timeout` seconds; returns (and saves) how it stands after that."""
        self._thread.join(max(timeout, 0.0))
        if self._thread.is_alive():
            self.cursor = replace(
                self.cursor,
                state=BackendState.PENDING,
                error=self.cursor.error or f"no answer within {self._deadline:.0f} s",
            )
            self.cursor.save(self._directory)
        return self.cursor

    @property
    def state(self) -> Cursor:
        """The cursor, with `hanging` if a call to the backend has not come back within the deadline."""
        called = self._called
        if called is not None and time.monotonic() - called > self._deadline:
            return replace(
                self.cursor,
                state=BackendState.HANGING,
                error=f"no answer for {time.monotonic() - called:.0f} s",
            )
        return self.cursor

    def _work(self) -> None:
        while not self._is_over():
            try:
                self._called = time.monotonic()
                more = self._step()
                self._called = None
            except BackendRefusedError as error:
                self._called = None
                self._disable(error)
                return
            except Exception as error:  # noqa: BLE001 - a backend is foreign code: whatever it raises stays here
                self._called = None
                self._fail(error)
                continue
            if self._failures:
                log.info("backend answers again", backend=self._backend.name, failures=self._failures)
                self._failures = 0
            self.cursor.state, self.cursor.error = BackendState.OK, None
            self._save_sometimes()
            if self._finishing.is_set() and not more:
                break
            if not more:
                self._finishing.wait(_PAUSE_SECONDS)
                if not self._finishing.is_set():
                    self._tail.wait(self.cursor.offset, _SAVE_SECONDS)
        self._close()

    def _is_over(self) -> bool:
        return self._end is not None and time.monotonic() >= self._end

    def _step(self) -> bool:
        """Open the backend if need be and deliver one read's worth. Returns whether there is more at once."""
        if not self._opened:
            self._open()
        rows = self._tail.read(self.cursor.offset, _READ_ROWS)
        for part in _split_at_attempts(rows):
            self._deliver(part)
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._backend.flush()
            self._flushed = time.monotonic()
        return len(rows) == _READ_ROWS or (self._finishing.is_set() and bool(rows))

    def _open(self) -> None:
        known = BackendIdentity(self.cursor.run_id, self.cursor.location or "") if self.cursor.run_id else None
        identity = self._backend.open(self._run, known)
        self.cursor.run_id, self.cursor.location = identity.run_id, identity.location
        self.cursor.save(self._directory)
        self._opened = True

    def _deliver(self, rows: Sequence[Record]) -> None:
        """Rows of one attempt, the attempt's own row alone. The cursor moves with every call that succeeded."""
        if rows[0].kind is Kind.ATTEMPT:
            if rows[0].attempt > 1 and self._backend.rewinds:
                self._backend.rewind(rows[0].step)
        elif not self._backend.rewinds and rows[0].attempt != self._replay.attempt:
            self._replay = _Replay(rows[0].attempt, self._shown_before(rows[0].attempt))
        for i in range(0, len(rows), self._backend.max_records):
            part = rows[i : i + self._backend.max_records]
            wanted = [row for row in part if row.kind in self._backend.kinds and not self._replay.is_repeat(row)]
            if wanted:
                self._backend.write(wanted)
            self.cursor.offset = part[-1].offset + 1
            self.cursor.delivered += len(part)

    def _shown_before(self, attempt: int) -> frozenset[Point]:
        """What earlier attempts showed from the resumed step on, read again from the journal."""
        shown: set[Point] = set()
        offset, step = 0, self._resumed_step(attempt)
        while attempt > 1 and (rows := self._tail.read(offset, _READ_ROWS * 10)):
            shown.update(
                (row.kind, row.key, row.step, row.rank) for row in rows if row.attempt < attempt and row.step >= step
            )
            offset = rows[-1].offset + 1
            if rows[-1].attempt >= attempt:
                break
        return frozenset(shown)

    def _fail(self, error: Exception) -> None:
        self._failures += 1
        self.cursor.state = BackendState.FAILING
        self.cursor.error = f"{type(error).__name__}: {error}" if not isinstance(error, BackendError) else str(error)
        if self._failures == 1:
            log.warning(
                "backend fails; training goes on, it is filled later",
                backend=self._backend.name,
                error=self.cursor.error,
            )
            self._save_sometimes(at_once=True)
        wait = retry_wait(self._failures, getattr(error, "retry_after", None))
        if self._finishing.is_set():
            left = (self._end or 0.0) - time.monotonic()
            time.sleep(max(min(wait, left), 0.0))
        else:
            self._finishing.wait(wait)

    def _disable(self, error: BackendRefusedError) -> None:
        self.cursor.state, self.cursor.error = BackendState.DISABLED, str(error)
        log.warning("backend disabled", backend=self._backend.name, error=str(error))
        self._save_sometimes(at_once=True)

    def _save_sometimes(self, *, at_once: bool = False) -> None:
        if at_once or time.monotonic() - self._saved > _SAVE_SECONDS:
            self.cursor.save(self._directory)
            self._saved = time.monotonic()

    def _close(self) -> None:
        complete = self.cursor.offset >= self._tail.next_offset
        try:
            if self._opened:
                self._called = time.monotonic()
                self._backend.flush()
                self._backend.close(self._status or "interrupted")
                self._called = None
        except Exception as error:  # noqa: BLE001 - as in _work
            self._called = None
            complete = False
            self.cursor.error = f"{type(error).__name__}: {error}"
        self.cursor.state = BackendState.COMPLETE if complete else BackendState.PENDING
        self.cursor.save(self._directory)


def _split_at_attempts(rows: Sequence[Record]) -> Iterable[Sequence[Record]]:
    """Neighbouring rows of one attempt, each ATTEMPT row alone."""
    begin = 0
    for i, row in enumerate(rows):
        boundary = row.kind is Kind.ATTEMPT or row.attempt != rows[begin].attempt
        after_boundary = i > begin and rows[i - 1].kind is Kind.ATTEMPT
        if i > begin and (boundary or after_boundary):
            yield rows[begin:i]
            begin = i
    if rows:
        yield rows[begin:]
