"""The files of a run's newest checkpoints a second time, in the memory of the node that wrote them.

In: the blocks on their way to storage, sealed if those are. Out: a Storage with the names of the run's directory.
A worker that is started again on the node reads from it. What is restored is decided by the storage alone, and each
file is held against its digest there, so a copy that is torn, stale or altered is passed over; whatever fails here
costs the copy and never the save. Kept are the newest that this rank has finished and the one being written. No torch.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from ray_tracking.checkpoint import manifest as names
from ray_tracking.checkpoint.nearby_folders import Claim
from ray_tracking.checkpoint.node_memory import look
from ray_tracking.errors import StorageError
from ray_tracking.log import get_logger
from ray_tracking.storage import Storage
from ray_tracking.writing import TEMPORARY, Writing

_CHECK_BYTES = 64 << 20
"""Between two looks at the memory that is left, which others use too."""
_log = get_logger()

_Order = tuple[int, int, int]
"""(attempt, step, try): later saves of a run are greater."""


class Nearby:
    """The copies of one run below `root`. `reserved`: bytes of the file system that others have a claim to."""

    def __init__(self, root: str, reserved: int = 0, claim: Claim | None = None) -> None:
        self.storage = Storage.open(root)
        self._reserved = reserved
        self._claim = claim
        self._said = False

    @classmethod
    def from_setup(cls, setup: Mapping[str, Any] | None) -> Nearby | None:
        """In another process, whose parent holds the claim."""
        return None if setup is None else cls(**setup)

    def setup(self) -> dict[str, Any]:
        return {"root": self.storage.root, "reserved": self._reserved}

    def copying(self, storage: Storage, folder: str, rank: int, size: int) -> Storage:
        """`storage`, for writing a rank's part of about `size` bytes into `folder`: its files are copied as they go."""
        return _CopyingStorage(storage, self, folder, rank, size)

    def begin(self, folder: str, rank: int, size: int) -> bool:
        """Remove the copies that are not needed any more; whether there is room for this one. Does not raise."""
        try:
            self._remove_older(folder, rank)
            if self.has_room(size):
                return True
            self._remove_older(folder, None)  # the newest will soon be one that has no copy
        except (OSError, StorageError) as error:
            self._say(str(error))
        return False

    def release(self) -> None:
        """Training has ended in order: the last process of the run on this node takes the copies away."""
        if self._claim is not None:
            self._claim.release()

    def _remove_older(self, folder: str, rank: int | None) -> None:
        """All but the newest that the rank has finished; with None that one too."""
        new = _order(folder)
        older = {order: name for name in self._folders() if (order := _order(name)) < new}
        finished = [order for order, name in older.items() if rank is not None and self._has_finished(name, rank)]
        for order, name in older.items():
            if order != max(finished, default=None):
                shutil.rmtree(self.storage.path(name), ignore_errors=True)
        if rank is None:
            return
        with contextlib.suppress(FileNotFoundError):  # what a writer that was killed left of this very part
            for entry in os.scandir(self.storage.path(folder)):
                if entry.name.startswith(_temporary(rank)):
                    os.unlink(entry.path)

    def _folders(self) -> list[str]:
        """Those of checkpoints, in attempts' folders and outside of them."""
        roots = ["", *(entry.name for entry in self.storage.list() if names.parse_attempt_folder(entry.name))]
        found = (names.join(root, entry.name) for root in roots for entry in self.storage.list(root))
        return [name for name in found if names.parse_step_folder(name.rpartition("/")[2])]

    def _has_finished(self, folder: str, rank: int) -> bool:
        places = (names.parse_rank_file(entry.name) for entry in self.storage.list(folder))
        return any(place is not None and place[0] == rank for place in places)

    def has_room(self, size: int) -> bool:
        """Whether `size` more bytes leave enough for everyone else; if not, it is said, once."""
        try:
            memory = look(self.storage.root)
        except (OSError, KeyError, ValueError) as error:
            self._say(f"how much memory is left can't be told: {error}")
            return False
        if memory.has_room(size, self._reserved):
            return True
        self._say(
            f"a part of {size / 2**20:.0f} MiB leaves too little: {memory.available / 2**20:.0f} of "
            f"{memory.total / 2**20:.0f} MiB are available, {memory.free / 2**20:.0f} MiB free in {self.storage.root}"
        )
        return False

    def _say(self, reason: str) -> None:
        if not self._said:
            _log.warning("no copy of the checkpoint in this node's memory; storage has it", reason=reason)
        self._said = True


class _CopyingStorage(Storage):
    """A storage that gives each file of a part to a copy as well. Old copies go, on its thread, before the first."""

    def __init__(self, real: Storage, nearby: Nearby, folder: str, rank: int, size: int) -> None:
        super().__init__(real.filesystem, real.root, real.uri)
        self._real = real
        self._nearby = nearby
        self._part = folder, rank, size
        self._copies: bool | None = None

    def create(self, name: str, size: int | None = None) -> Writing:
        if self._copies is None:
            self._copies = self._nearby.begin(*self._part)
        writing = self._real.create(name, size)
        if not self._copies:
            return writing
        return _CopiedWriting(writing, _FileCopy(self._nearby.storage.path(name), self._part[1], self._nearby.has_room))


class _CopiedWriting(Writing):
    """The file on storage comes first: what fails there is not copied, what fails here is not told."""

    def __init__(self, real: Writing, copy: _FileCopy) -> None:
        self._real = real
        self._file_copy = copy

    def write(self, block: bytes | memoryview) -> None:
        self._real.write(block)
        self._file_copy.write(block)

    def commit(self) -> None:
        try:
            self._real.commit()
        except Exception:
            self._file_copy.abandon()
            raise
        self._file_copy.commit()

    def abandon(self) -> None:
        self._real.abandon()
        self._file_copy.abandon()


class _FileCopy:
    """One file of a copy: under its name once it is whole. Does not raise; gone as soon as anything fails."""

    def __init__(self, path: str, rank: int, has_room: Callable[[int], bool]) -> None:
        self._path = path
        self._has_room = has_room
        self._unlooked = 0
        folder, _ = os.path.split(path)
        self._temporary = os.path.join(folder, f"{_temporary(rank)}{secrets.token_hex(4)}")
        self._file = -1
        try:
            for each in (os.path.dirname(folder), folder):  # in a folder it makes on the way, the mode does not count
                os.makedirs(each, mode=0o700, exist_ok=True)
            self._file = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self._fail(error)

    def write(self, block: bytes | memoryview) -> None:
        if self._file < 0:
            return
        rest = memoryview(block)
        self._unlooked += len(rest)
        if self._unlooked >= _CHECK_BYTES:
            self._unlooked = 0
            if not self._has_room(_CHECK_BYTES):
                self.abandon()
                return
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as error:
            self._fail(error)

    def commit(self) -> None:
        if self._file < 0:
            return
        try:
            self._close()
            os.replace(self._temporary, self._path)
        except OSError as error:
            self._fail(error)

    def abandon(self) -> None:
        with contextlib.suppress(OSError):
            self._close()
            os.unlink(self._temporary)

    def _close(self) -> None:
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)

    def _fail(self, error: OSError) -> None:
        """Someone cleaned up under us, or the memory is full: the storage has it."""
        _log.debug("a file not copied to memory", path=self._path, error=str(error))
        self.abandon()


def _temporary(rank: int) -> str:
    return f"{TEMPORARY}{rank:05d}-"


def _order(folder: str) -> _Order:
    attempt, _, step = folder.rpartition("/")
    return (names.parse_attempt_folder(attempt) or 0, *(names.parse_step_folder(step) or (-1, 0)))
