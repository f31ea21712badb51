"""Writing one file in blocks: whole and durable, or not there. The two ways of it: local disks and object stores."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ray_tracking.errors import StorageError

if TYPE_CHECKING:
    from pyarrow import fs

TEMPORARY = ".tmp-"
"""What the name of an unfinished local file begins with."""
_FLUSH_BYTES = 16 << 20

Failure = Callable[[str, str, OSError], StorageError]
"""(verb, path, error) as the error to raise."""


class Writing:
    """A file on its way to storage. As a context manager it is committed at the end, abandoned by an error.

    Its calls may come from different threads, one at a time. Raises StorageError.
    """

    def __init__(self, path: str, failure: Failure) -> None:
        self._path = path
        self._failure = failure

    def write(self, block: bytes | memoryview) -> None:
        with self._errors():
            self._write(block)

    def commit(self) -> None:
        """Durable and visible when it returns."""
        with self._errors():
            self._commit()

    def abandon(self) -> None:
        """Leave nothing of it."""
        with contextlib.suppress(OSError):
            self._abandon()

    def _write(self, block: bytes | memoryview) -> None:
        raise NotImplementedError

    def _commit(self) -> None:
        raise NotImplementedError

    def _abandon(self) -> None:
        raise NotImplementedError

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abandon()
            raise self._failure("write", self._path, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.commit()
        else:
            self.abandon()


class LocalWriting(Writing):
    """Written beside its place, made durable, renamed into place, and the rename made durable."""

    def __init__(self, path: str, failure: Failure, size: int | None) -> None:
        super().__init__(path, failure)
        self._folder = os.path.dirname(path)
        make_folder(self._folder)
        self._temporary = os.path.join(self._folder, f"{TEMPORARY}{secrets.token_hex(8)}")
        self._file = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._written = self._flushing = 0
        self._allocated = size or 0
        if size:
            try:
                _allocate(self._file, size)
            except OSError:
                self._abandon()
                raise

    def _write(self, block: bytes | memoryview) -> None:
        rest = memoryview(block)
        while rest:
            count = os.write(self._file, rest)
            self._written += count
            rest = rest[count:]
        if self._written - self._flushing >= _FLUSH_BYTES:
            _begin_writeback(self._file, self._flushing, self._written - self._flushing)
            self._flushing = self._written

    def _commit(self) -> None:
        if self._allocated > self._written:
            os.ftruncate(self._file, self._written)
        os.fsync(self._file)
        os.close(self._file)
        self._file = -1
        os.replace(self._temporary, self._path)
        fsync_folder(self._folder)

    def _abandon(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        Path(self._temporary).unlink(missing_ok=True)


class RemoteWriting(Writing):
    """pyarrow can't abandon an object: it is closed, and, if that made it whole, taken away."""

    def __init__(self, path: str, failure: Failure, filesystem: fs.FileSystem) -> None:
        super().__init__(path, failure)
        self._filesystem = filesystem
        self._stream = filesystem.open_output_stream(path)

    def _write(self, block: bytes | memoryview) -> None:
        self._stream.write(block)

    def _commit(self) -> None:
        self._stream.close()

    def _abandon(self) -> None:
        self._stream.close()  # if this fails, no object was made, and an older one of the name is still there
        self._filesystem.delete_file(self._path)


def _allocate(file: int, size: int) -> None:
    """Reserve the blocks, so that a disk that is too full says so now; file systems that can't are left alone."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


@functools.cache
def _sync_file_range() -> Any:
    import ctypes

    return getattr(ctypes.CDLL(None), "sync_file_range", None)


def _begin_writeback(file: int, offset: int, size: int) -> None:
    """Let the disk begin while more is written: measured, it takes a third off a large write with its fsync."""
    import ctypes

    begin = _sync_file_range()
    if begin is not None:  # Linux; its failure only means that fsync has all of the work
        begin(file, ctypes.c_int64(offset), ctypes.c_int64(size), 2)


def make_folder(path: str) -> None:
    """Make a folder and its parents, each entry durable: a file is lost with the folder it lies in."""
    if os.path.isdir(path):
        return
    if os.path.lexists(path) and not os.path.isdir(path):  # asked again: another process may just have made it
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", path)
    parent = os.path.dirname(path)
    if parent != path:
        make_folder(parent)
    os.makedirs(path, exist_ok=True)
    fsync_folder(parent)


def fsync_folder(path: str) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
