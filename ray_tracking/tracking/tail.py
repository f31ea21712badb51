"""The newest journal rows in memory, so that a backend that keeps up never reads the storage."""

from __future__ import annotations

import threading
from collections import deque

from ray_tracking.journal.reader import JournalReader
from ray_tracking.records import Record


class Tail:
    """Rows by offset: from memory if they are new enough, else from the journal. Thread-safe."""

    def __init__(self, reader: JournalReader, next_offset: int, keep: int = 20_000) -> None:
        self._reader = reader
        self._keep = keep
        self._rows: deque[Record] = deque()
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
            self._next = records[-1].offset + 1
            while len(self._rows) > self._keep:
                self._rows.popleft()
            self._changed.notify_all()

    def wait(self, offset: int, timeout: float) -> bool:
        """Wait until there is a row at `offset`, or until woken. False if the time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: self._next > offset, timeout)

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def read(self, start: int, limit: int) -> list[Record]:
        """Up to `limit` rows from offset `start`; none if there are no more."""
        with self._changed:
            if start >= self._next:
                return []
            first = self._rows[0].offset if self._rows else self._next
            if start >= first:
                begin = start - first
                return [self._rows[i] for i in range(begin, min(begin + limit, len(self._rows)))]
        return self._reader.read(start, limit)
