"""A storage that stops the process at operation N: before it, in the middle of it, or right after it; a small disk."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ray_tracking.storage import Storage
from ray_tracking.writing import Writing


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the package catches it."""


class KillingStorage(Storage):
    """A storage that raises Killed at write or delete number `at` (from 1); `count` were begun.

    `when="during"` leaves what a file system without atomic rename would: half a file or folder.
    """

    def __init__(self, root: Path | str, at: int = 0, when: str = "before") -> None:
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

    def create(self, name: str, size: int | None = None) -> Writing:
        self._begin()
        return KillingWriting(super().create(name, size), self, name)

    def delete(self, name: str) -> None:
        self._begin()
        super().delete(name)
        self._end()

    def delete_dir(self, name: str) -> None:
        self._begin()
        if self._now("during"):
            files = [entry.name for entry in self.list(name)]
            for file in files[: len(files) // 2]:
                super().delete(f"{name}/{file}")
            raise Killed
        super().delete_dir(name)
        self._end()


class KillingWriting(Writing):
    """A file of a KillingStorage; the kill "during" it falls between its blocks and its name."""

    def __init__(self, real: Writing, storage: KillingStorage, name: str) -> None:
        self._real = real
        self._storage = storage
        self._name = name
        self._data = b""
        self._kill = storage._now("during")
        self._kill_after = storage._now("after")

    def write(self, block: bytes | memoryview) -> None:
        self._data += bytes(block)
        self._real.write(block)

    def commit(self) -> None:
        if self._kill:
            # Both what a kill leaves here, an unfinished file beside, and what a file system without rename would.
            plain = Storage.open(self._storage.uri)
            plain.write_bytes(self._name, self._data[: len(self._data) // 2])
            raise Killed
        self._real.commit()
        if self._kill_after:
            raise Killed

    def abandon(self) -> None:
        """A process that is killed tidies nothing up."""


def kill_points(limit: int = 200) -> Iterator[tuple[int, str]]:
    """(N, when) for N = 1, 2, ...; stop when the storage's count shows that N was never reached."""
    for number in range(1, limit):
        for when in ("before", "during", "after"):
            yield number, when
    raise AssertionError("the operation never ends")


@contextmanager
def limited_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own at `folder`, of `size` (`6m`, say). Skips where none can be mounted."""
    if os.geteuid() != 0:
        pytest.skip("a file system of limited size needs root to be mounted")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system of limited size can be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # who looks at it just now is no error
