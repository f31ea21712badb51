"""Records for the journal's tests, and a storage that fails when it is told to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ray_tracking.errors import StorageError
from ray_tracking.records import Kind, Record
from ray_tracking.storage import Storage


def scalar(
    step: int, value: float = 0.5, *, key: str = "loss", attempt: int = 1, seq: int = 0, rank: int = 0
) -> Record:
    return Record(Kind.SCALAR, key, step, 1.7e9 + step, value, None, rank, attempt, seq)


def call(seq: int, *, rows: int = 3, attempt: int = 1, rank: int = 0) -> list[Record]:
    """The records of one log call."""
    return [scalar(seq, seq + row / 8, key=f"k{row}", attempt=attempt, seq=seq, rank=rank) for row in range(rows)]


def began(attempt: int, resumed: int) -> Record:
    return Record(Kind.ATTEMPT, "attempt", resumed, 1.7e9, None, None, 0, attempt)


def plain(records: Iterable[Record]) -> list[Record]:
    """Without offsets."""
    return [record._replace(offset=-1) for record in records]


class Killed(BaseException):
    """The process ends here: nothing may catch it."""


class FaultyStorage(Storage):
    """Local storage whose operation number `at` (from 0) raises `fault()`, done or not; later ones work."""

    def __init__(
        self,
        like: Storage,
        at: int | None,
        *,
        done: bool = False,
        fault: Callable[[], BaseException] = Killed,
    ) -> None:
        super().__init__(like.filesystem, like.root, like.uri)
        self.at, self.done, self.fault = at, done, fault
        self.operations: list[str] = []

    def _pass(self, name: str, *arguments: Any) -> Any:
        number = len(self.operations)
        self.operations.append(f"{name} {arguments[0] if arguments else ''}")
        real = getattr(super(), name)
        if number != self.at:
            return real(*arguments)
        if self.done:
            real(*arguments)
        raise self.fault()

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        self._pass("write_bytes", name, data)

    def read_bytes(self, name: str) -> bytes:
        return self._pass("read_bytes", name)

    def delete(self, name: str) -> None:
        self._pass("delete", name)

    def delete_dir(self, name: str) -> None:
        self._pass("delete_dir", name)

    def walk(self, name: str = ""):
        return iter(list(self._pass("walk", name)))


def disk_full() -> StorageError:
    return StorageError("Can't write: [Errno 28] No space left on device")
