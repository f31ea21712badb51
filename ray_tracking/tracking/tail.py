"""The newest journal rows in memory, so that a backend that keeps up never reads the storage."""

from __future__ import annotations

import threading
from collections.abc import Callable

from ray_tracking.records import Record

_ROW_BYTES = 200
"""About what a row takes besides its data."""


class Tail:
    """Rows by offset, the newest `keep` and at most about `keep_bytes`. Thread-safe."""

    def __init__(self, next_offset: int, keep: int = 20_000, keep_bytes: int = 64 << 20) -> None:
        self._keep = keep
        self._keep_bytes = keep_bytes
        self._rows: list[Record] = []  # a deque would be walked from its end to where a read begins
        self._bytes = 0
        self._next = next_offset
        self._changed = threading.Condition()

    @property
    def next_offset(self) -> int:
        with self._changed:
            return self._next

    def add(self, records: list[Record]) -> None:
        """Rows that are durable now, in order."""
        with self._changed:
            self._rows.extend(records)
            self._bytes += _size(records)
            self._next = records[-1].offset + 1
            self._drop_oldest()
            self._changed.notify_all()

    def _drop_oldest(self) -> None:
        count = max(0, len(self._rows) - self._keep)
        self._bytes -= _size(self._rows[:count])
        while self._bytes > self._keep_bytes:
            self._bytes -= _size(self._rows[count : count + 1])
            count += 1
        del self._rows[:count]

    def wait(self, offset: int, timeout: float, over: Callable[[], bool] = lambda: False) -> None:
        """Wait until there is a row at `offset`, until woken, or until the time runs out.

        Not at all if it is `over`: whoever makes it so wakes the waiting after that.
        """
        with self._changed:
            if self._next <= offset and not over():
                self._changed.wait(timeout)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def read(self, start: int, limit: int) -> list[Record] | None:
        """Up to `limit` rows from offset `start`; [] if there are no more, None if they are only in the journal."""
        with self._changed:
            if start >= self._next:
                return []
            begin = start - (self._rows[0].offset if self._rows else self._next)
            return self._rows[begin : begin + limit] if begin >= 0 else None


def _size(records: list[Record]) -> int:
    return _ROW_BYTES * len(records) + sum(len(record.data) for record in records if record.data)
