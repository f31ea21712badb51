"""A storage that stops the process at operation N: before it, in the middle of it, or right after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ray_tracking.storage import Storage


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


class KillingStorage(Storage):
    """Local storage that raises Killed at write or delete number `at` (from 1); `count` were begun.

    `when="during"` leaves what a file system without atomic rename would: half a file or folder.
    """

    def __init__(self, root: Path, at: int = 0, when: str = "before") -> None:
        opened = Storage.open(root)
        super().__init__(opened.filesystem, opened.root, opened.uri)
        self.at, self.when, self.count = at, when, 0

    def _now(self, when: str) -> bool:
        return self.count == self.at and self.when == when

    def _begin(self) -> None:
        self.count += 1
        if self._now("before"):
            raise Killed

    def _end(self) -> None:
        if self._now("after"):
            raise Killed

    def write_bytes(self, name: str, data: bytes | memoryview) -> None:
        self._begin()
        if self._now("during"):
            path = Path(self.path(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(data)[: len(data) // 2])
            raise Killed
        super().write_bytes(name, data)
        self._end()

    def delete(self, name: str) -> None:
        self._begin()
        super().delete(name)
        self._end()

    def delete_dir(self, name: str) -> None:
        self._begin()
        if self._now("during"):
            files = sorted(Path(self.path(name)).iterdir())
            for file in files[: len(files) // 2]:
                os.unlink(file)
            raise Killed
        super().delete_dir(name)
        self._end()


def kill_points(limit: int = 200) -> Iterator[tuple[int, str]]:
    """(N, when) for N = 1, 2, ...; stop when the storage's count shows that N was never reached."""
    for number in range(1, limit):
        for when in ("before", "during", "after"):
            yield number, when
    raise AssertionError("the operation never ends")
