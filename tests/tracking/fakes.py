"""Doubles with a will of their own: trackers that fail now and then, backends that raise, hang or refuse."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ray_tracking.errors import StorageError
from ray_tracking.journal.writer import JournalWriter
from ray_tracking.records import Event, Kind, Record
from ray_tracking.storage import Storage
from ray_tracking.testing import InMemoryBackend
from ray_tracking.tracking.backends.base import Backend, BackendIdentity, RunInfo
from ray_tracking.tracking.tail import Tail
from ray_tracking.tracking.transport import TransportError, unpack


def wait_until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Poll; an AssertionError if it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


class Clock:
    def __init__(self, step: int = 1) -> None:
        self.step = step

    @property
    def here(self) -> int:
        return self.step


class FakeTracker:
    """A Transport that journals into a list, each event once, by the rule of the service.

    `before` and `after` are chances of failing before the batch is kept, or after (the reply is lost).
    """

    def __init__(self, before: float = 0.0, after: float = 0.0, seed: int = 0) -> None:
        self.events: list[Event] = []
        self.calls = 0
        self.open = threading.Event()
        self.open.set()
        self.error: Exception | None = None
        self._chance = random.Random(seed)
        self._before = before
        self._after = after

    def append(self, rank: int, attempt: int, batch: bytes) -> int:
        self.calls += 1
        self.open.wait()
        if self.error is not None:
            raise self.error
        if self._chance.random() < self._before:
            raise TransportError("lost on its way")
        last = self.events[-1].seq if self.events else 0
        self.events += [event for event in unpack(batch) if event.seq > last]
        if self._chance.random() < self._after:
            raise TransportError("the reply was lost")
        return self.events[-1].seq if self.events else 0

    def call(self, method: str, *arguments: Any, timeout: float | None = None) -> Any:
        raise AssertionError(method)

    def close(self) -> None: ...


class FakeBackend(InMemoryBackend):
    """In memory; every call can be made to raise, wait or never come back."""

    def __init__(
        self,
        name: str = "memory",
        failures: Iterable[Exception] = (),
        *,
        rewinds: bool = True,
        kinds: frozenset[Kind] | None = None,
        max_records: int = 1000,
        broken: Exception | None = None,
        broken_close: Exception | None = None,
        seconds: float = 0.0,
    ) -> None:
        super().__init__(failures)
        self.name = name  # type: ignore[misc]
        self.rewinds = rewinds  # type: ignore[misc]
        self.kinds = kinds or InMemoryBackend.kinds  # type: ignore[misc]
        self.max_records = max_records  # type: ignore[misc]
        self.broken = broken
        self.broken_close = broken_close
        self.seconds = seconds
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[str] = []
        self.chunks: list[int] = []

    def position(self) -> int | None:
        return None

    def open(self, run: RunInfo, identity: BackendIdentity | None) -> BackendIdentity:
        self.calls.append("open")
        self._meet()
        return super().open(run, identity)

    def write(self, records: Sequence[Record]) -> None:
        self.calls.append("write")
        self._meet()
        self._fail()
        self.records += records  # as they come: nothing is taken for a repeat here
        self.chunks.append(len(records))

    def rewind(self, step: int) -> None:
        self.calls.append(f"rewind {step}")
        super().rewind(step)

    def close(self, status: str) -> None:
        self.calls.append("close")
        if self.broken_close is not None:
            raise self.broken_close
        super().close(status)

    def _meet(self) -> None:
        self.gate.wait()
        time.sleep(self.seconds)
        if self.broken is not None:
            raise self.broken


class PositionedBackend(FakeBackend):
    """One that knows what it holds: `held` is the offset of the last record."""

    held: ClassVar[int | None] = None

    def __init__(self, held: int, **options: Any) -> None:
        super().__init__(**options)
        self._known = held

    def position(self) -> int | None:
        return self._known


class FlakyStorage(Storage):
    """Local; the next `failures` writes raise, before (or with `lands`, after) the file is there."""

    failures = 0
    lands = False

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        if self.failures > 0:
            self.failures -= 1
            if self.lands:
                super().write_bytes(name, data)
            raise StorageError(f"Can't write {name!r}: no space left on device")
        super().write_bytes(name, data)


class Journal:
    """A run's directory with its journal and tail, as the service keeps them."""

    def __init__(self, folder: Path) -> None:
        self.storage = Storage.open(folder)
        self.writer = JournalWriter(self.storage, 1)
        self.tail = Tail(self.writer.next_offset)

    def add(self, *records: Record) -> None:
        for record in records:
            if record.attempt > self.writer.attempt:
                self.writer.begin_attempt(record.attempt)
        self.tail.add(self.writer.append(records))

    def points(self, steps: Iterable[int], *, attempt: int = 1, keys: int = 2, value: float = 0.0) -> None:
        self.add(
            *(
                Record(Kind.SCALAR, f"m{k}", step, 1000.0 + step, value + step + k / 10, attempt=attempt)
                for step in steps
                for k in range(keys)
            )
        )

    def begin(self, attempt: int, step: int) -> None:
        self.add(Record(Kind.ATTEMPT, "attempt", step, 1000.0, None, b"", attempt=attempt))


def shown(backend: Backend) -> list[tuple[str, int, float]]:
    assert isinstance(backend, InMemoryBackend)
    return backend.points
