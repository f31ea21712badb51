"""Batches that the tracker has not acknowledged: in memory, and on local disk once they grow too large."""

from __future__ import annotations

import tempfile
import threading
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ray_tracking.log import get_logger

log = get_logger()


class Batch(NamedTuple):
    """Packed events `first` to `last` (sequence numbers, inclusive)."""

    first: int
    last: int
    data: bytes


class _File(Protocol):
    def seek(self, offset: int) -> int: ...
    def read(self, size: int) -> bytes: ...
    def write(self, data: bytes | memoryview) -> int: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class _Slot:
    """A batch in memory, or (`data` is None) in the file at `offset`."""

    first: int
    last: int
    size: int
    data: bytes | None
    offset: int = 0


class Outbox:
    """First in, first out, thread-safe. What exceeds `memory_limit` bytes waits in an unnamed temporary file.

    If the disk does not take it, it stays in memory: a batch is never dropped.
    """

    def __init__(self, memory_limit: int = 64 << 20) -> None:
        self._limit = memory_limit
        self._lock = threading.Lock()
        self._slots: deque[_Slot] = deque()
        self._memory_bytes = 0
        self._spilled = 0
        self._file: _File | None = None
        self._file_bytes = 0
        self._disk_failed = False

    def __len__(self) -> int:
        with self._lock:
            return len(self._slots)

    @property
    def events(self) -> int:
        """How many events wait."""
        with self._lock:
            return sum(slot.last - slot.first + 1 for slot in self._slots)

    @property
    def spilled(self) -> int:
        """How many batches wait on disk."""
        with self._lock:
            return self._spilled

    def put(self, batch: Batch) -> None:
        with self._lock:
            slot = _Slot(batch.first, batch.last, len(batch.data), batch.data)
            if self._memory_bytes + slot.size > self._limit:
                self._spill(slot)
            if slot.data is not None:
                self._memory_bytes += slot.size
            self._slots.append(slot)

    def peek(self) -> Batch | None:
        """The oldest batch, which stays until `acknowledge`. Raises OSError if it can't be read from disk."""
        with self._lock:
            if not self._slots:
                return None
            slot = self._slots[0]
            data = self._load(slot) if slot.data is None else slot.data
            return Batch(slot.first, slot.last, data)

    def acknowledge(self, seq: int) -> None:
        """Forget all batches up to sequence number `seq`."""
        with self._lock:
            while self._slots and self._slots[0].last <= seq:
                slot = self._slots.popleft()
                if slot.data is None:
                    self._spilled -= 1
                else:
                    self._memory_bytes -= slot.size
            if self._file is not None and not self._spilled:
                self._file.close()
                self._file, self._file_bytes = None, 0

    def _spill(self, slot: _Slot) -> None:
        assert slot.data is not None
        try:
            if self._file is None:
                # Unbuffered: a full disk must say so here, not at a later seek.
                self._file = tempfile.TemporaryFile(prefix="ray-tracking-spill-", buffering=0)  # noqa: SIM115
            self._file.seek(self._file_bytes)
            rest = memoryview(slot.data)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if not self._disk_failed:
                log.warning(
                    "the local disk takes no more waiting records; they stay in memory",
                    folder=tempfile.gettempdir(),
                    error=str(error),
                    fix="free space there, or set TMPDIR",
                )
            self._disk_failed = True
            return
        self._disk_failed = False
        slot.data, slot.offset = None, self._file_bytes
        self._file_bytes += slot.size
        self._spilled += 1

    def _load(self, slot: _Slot) -> bytes:
        assert self._file is not None
        self._file.seek(slot.offset)
        parts: list[bytes] = []
        missing = slot.size
        while missing:
            part = self._file.read(missing)
            if not part:
                raise OSError(f"the spill file lacks {missing} bytes of the records {slot.first} to {slot.last}")
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)
