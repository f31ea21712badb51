"""Batches that the tracker has not acknowledged: in memory, and on local disk once they grow too large."""

from __future__ import annotations

import tempfile
import threading
from collections import deque
from typing import IO, NamedTuple


class Batch(NamedTuple):
    """Packed events `first` to `last` (sequence numbers, inclusive)."""

    first: int
    last: int
    data: bytes


class Outbox:
    """First in, first out, thread-safe. What exceeds `memory_limit` bytes waits in an unnamed temporary file."""

    def __init__(self, memory_limit: int = 64 << 20) -> None:
        self._limit = memory_limit
        self._lock = threading.Lock()
        self._memory: deque[Batch] = deque()
        self._memory_bytes = 0
        self._file: IO[bytes] | None = None
        self._spilled: deque[tuple[int, int, int, int]] = deque()  # first, last, offset, size

    def __len__(self) -> int:
        with self._lock:
            return len(self._memory) + len(self._spilled)

    @property
    def events(self) -> int:
        """How many events wait."""
        with self._lock:
            waiting = sum(batch.last - batch.first + 1 for batch in self._memory)
            return waiting + sum(last - first + 1 for first, last, _, _ in self._spilled)

    def put(self, batch: Batch) -> None:
        with self._lock:
            if not self._spilled and self._memory_bytes + len(batch.data) <= self._limit:
                self._memory.append(batch)
                self._memory_bytes += len(batch.data)
            else:
                self._spill(batch)

    def peek(self) -> Batch | None:
        """The oldest batch, which stays until `acknowledge`."""
        with self._lock:
            if not self._memory and self._spilled:
                self._load()
            return self._memory[0] if self._memory else None

    def acknowledge(self, seq: int) -> None:
        """Forget all batches up to sequence number `seq`."""
        with self._lock:
            while self._memory and self._memory[0].last <= seq:
                self._memory_bytes -= len(self._memory.popleft().data)

    def _spill(self, batch: Batch) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="ray-tracking-spill-")  # noqa: SIM115 - open until it is empty
        self._file.seek(0, 2)
        self._spilled.append((batch.first, batch.last, self._file.tell(), len(batch.data)))
        self._file.write(batch.data)

    def _load(self) -> None:
        assert self._file is not None
        first, last, offset, size = self._spilled.popleft()
        self._file.seek(offset)
        self._memory.append(Batch(first, last, self._file.read(size)))
        self._memory_bytes += size
        if not self._spilled:
            self._file.close()
            self._file = None
