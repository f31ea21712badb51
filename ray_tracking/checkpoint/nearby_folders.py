"""Where copies of checkpoints lie in a node's shared memory, who uses them, and their removal. No torch.

In: a run's directory. Out: a private folder of its own, named by a digest, held by a shared lock on a file in it for as
long as a process of the run lives here. A folder that nobody holds is removed when it has not been used for half an
hour and another run begins here, by `ray-tracking gc`, or at once when the run has ended.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ray_tracking.storage import Storage, without_credentials

SHARED_MEMORY = Path("/dev/shm")
KEPT_SECONDS = 1800.0
"""How long copies wait for workers to be started again."""

_LOCK = "in-use"
_GONE = ".gone-"
_TRIES, _PAUSE_SECONDS = 50, 0.1


@dataclass(frozen=True, slots=True)
class Leftover:
    """The copies of one run. `directory`: where the run lies; `modified`: when a process last came to use them."""

    path: Path
    directory: str
    bytes: int
    in_use: bool
    modified: float

    def is_recent(self, now: float) -> bool:
        """Whether workers that want them may still come."""
        return now - self.modified < KEPT_SECONDS


class Claim:
    """That this process uses the copies in `path`. It ends with the process at the latest."""

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self._file = file

    def release(self) -> None:
        """Let go of them; the last one on the node removes them."""
        file, self._file = self._file, -1
        if file >= 0:
            fcntl.flock(file, fcntl.LOCK_UN)  # before it is asked for alone: of several at once one gets it
            _remove_if_unused(self.path, file)


def claim(directory: Storage, shared: Path = SHARED_MEMORY) -> Claim:
    """Use the copies of a run, for as long as this process lives. Removes what other runs have left for good.

    Raises OSError where that can't be.
    """
    base = _base(shared)
    sweep(base)
    path = _folder(base, directory)
    for _ in range(_TRIES):
        with suppress(FileNotFoundError, BlockingIOError):  # it is being removed
            base.mkdir(mode=0o700, exist_ok=True)
            if not _is_private(base):
                raise PermissionError(f"{base} is not a folder of this user that is closed to others")
            path.mkdir(mode=0o700, exist_ok=True)
            file = _locked(path, fcntl.LOCK_SH)
            try:
                os.ftruncate(file, 0)
                os.pwrite(file, without_credentials(directory.uri).encode(), 0)
                os.utime(file)
            except OSError:
                os.close(file)  # and with it the lock, which says that the folder is in use
                raise
            return Claim(path, file)
        time.sleep(_PAUSE_SECONDS)
    raise TimeoutError(f"{path} is locked by another process")


def forget(directory: Storage, shared: Path = SHARED_MEMORY) -> None:
    """Remove the copies of a run that has ended. Its last processes get some seconds to end too. Does not raise."""
    path = _folder(_base(shared), directory)
    for _ in range(_TRIES):
        with suppress(OSError):
            if not path.exists() or not _is_private(path.parent) or _remove_if_unused(path, _opened(path)):
                return
        time.sleep(_PAUSE_SECONDS)


def sweep(base: Path, now: float | None = None) -> None:
    """Remove what nobody has come back to. Does not raise."""
    for leftover in _leftovers(base):
        if not leftover.in_use and not leftover.is_recent(time.time() if now is None else now):
            remove(leftover)


def leftovers(shared: Path = SHARED_MEMORY) -> list[Leftover]:
    """The copies of this user on this machine."""
    return sorted(_leftovers(_base(shared)), key=lambda leftover: leftover.path)


def of_run(directory: Storage, shared: Path = SHARED_MEMORY) -> Path:
    """Where the copies of a run lie, if there are any."""
    return _folder(_base(shared), directory)


def remove(leftover: Leftover) -> bool:
    """Remove them unless a process has come to use them meanwhile."""
    with suppress(OSError):
        if leftover.path.name.startswith(_GONE):
            shutil.rmtree(leftover.path)
            return True
        return _remove_if_unused(leftover.path, _opened(leftover.path))
    return False


def _base(shared: Path) -> Path:
    return shared / f"ray-tracking-{os.geteuid()}"


def _is_private(base: Path) -> bool:
    """Whether it is ours alone: where everyone may create files, someone else may have made it."""
    status = base.lstat()
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o077


def _folder(base: Path, directory: Storage) -> Path:
    name = f"{directory.filesystem.type_name}:{directory.root}"
    return base / hashlib.sha256(name.encode()).hexdigest()[:24]


def _opened(path: Path) -> int:
    return os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _locked(path: Path, kind: int) -> int:
    """The lock file, locked. Raises BlockingIOError, FileNotFoundError if the folder was removed meanwhile."""
    file = _opened(path)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file), os.stat(path / _LOCK)):
            raise FileNotFoundError(path)
    except OSError:
        os.close(file)
        raise
    return file


def _remove_if_unused(path: Path, file: int) -> bool:
    """Whether it was removed. `file` is the lock file, which is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file), os.stat(path / _LOCK)):
            return False
        gone = path.with_name(f"{_GONE}{secrets.token_hex(8)}")
        path.rename(gone)  # at once: whoever comes now makes a new one
        shutil.rmtree(gone)
    except OSError:
        return False
    finally:
        os.close(file)
    with suppress(OSError):
        path.parent.rmdir()  # if there is no other
    return True


def _leftovers(base: Path) -> Iterator[Leftover]:
    with suppress(OSError):
        for path in base.iterdir() if _is_private(base) else ():
            with suppress(OSError):  # it has just been removed
                yield _leftover(path)


def _leftover(path: Path) -> Leftover:
    lock = path / _LOCK
    if path.name.startswith(_GONE):
        return Leftover(path, "", _size(path), in_use=False, modified=0.0)
    if not lock.exists():  # whoever made the folder has not come further
        return Leftover(path, "", _size(path), in_use=False, modified=path.stat().st_mtime)
    return Leftover(path, lock.read_text(), _size(path), _is_in_use(lock), lock.stat().st_mtime)


def _is_in_use(lock: Path) -> bool:
    file = os.open(lock, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
