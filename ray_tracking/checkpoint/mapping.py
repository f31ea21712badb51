"""Files to memory: all bytes of a stored file, mapped or read, and private memory to put bytes into. No torch.

In: a Storage, a name, the size the file has to have. Out: `FileMemory`.
A mapping costs no copy and no memory, but a file that goes away under it ends the process with SIGBUS. On a local file
system only cutting it in place does that, and nothing here does; on a network file system deleting it on another
machine does: there, and on object stores, files are read into private memory.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

import numpy as np
import xxhash

from ray_tracking.errors import StorageError
from ray_tracking.storage import Storage

THREADS = 4
"""Reads of one file under way at once where it is read and not mapped."""
_BLOCK = 16 << 20
_HUGE_PAGE = 2 << 20
ALIGNMENT = 64
"""Of tensors with memory of their own, as torch aligns them."""
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_NETWORK = re.compile(r"nfs\d?|cifs|smb\d?|9p|virtiofs|fuse(?:blk|\..+)?|ceph|lustre|gpfs|beegfs|afs|pvfs2|gfs2|ocfs2")


class NotThatFileError(ValueError):
    """What lies under the name can't be the file that was written; the text is the reason."""


class FileMemory:
    """The bytes of a file. `view` is writable; what is written there never reaches the file.

    Until it is closed, keep no other reference to `view` than through it. After that, what still views the memory (a
    tensor that was kept) stays valid, and is not changed by what is written to the file.
    """

    def __init__(self, view: memoryview, mapped: mmap.mmap | None = None) -> None:
        self.view = view
        self._mapped = mapped

    def close(self, *, discard: bool = False) -> None:
        """Unmap now. `discard`: whatever still views it is not used again (it goes with an error), so isn't kept."""
        # Not view.release(): a tensor made from the view holds the object but no export of it, and would then point
        # to nothing. The mapping counts the view itself, and closes only when that is gone.
        self.view = memoryview(b"")
        mapped, self._mapped = self._mapped, None
        if mapped is None:
            return
        try:
            mapped.close()
        except BufferError:
            if not discard:
                _detach(mapped)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(discard=kind is not None)


def _detach(mapped: mmap.mmap) -> None:
    """Write to every page of a private mapping: each becomes a copy of its own."""
    pages = np.frombuffer(mapped, np.uint8)[:: mmap.PAGESIZE]
    np.bitwise_or(pages, 0, out=pages)


def room(size: int) -> memoryview:
    """Writable private memory, aligned; in huge pages where that saves most of the cost of its first use.

    It is given back when the last view of it is gone. Raises MemoryError.
    """
    if size < 2 * _HUGE_PAGE:
        small = bytearray(size + ALIGNMENT)
        begin = -int(np.frombuffer(small, np.uint8).ctypes.data) % ALIGNMENT
        return memoryview(small)[begin : begin + size]
    try:
        memory = mmap.mmap(-1, size + _HUGE_PAGE, access=mmap.ACCESS_COPY)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"no room for {size} bytes: {error}") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        _advise(memory, mmap.MADV_HUGEPAGE)
    begin = -int(np.frombuffer(memory, np.uint8).ctypes.data) % _HUGE_PAGE
    return memoryview(memory)[begin : begin + size]


def open_bytes(storage: Storage, name: str, size: int | None, *, follow_links: bool = False) -> FileMemory:
    """The whole file `name`, which must have `size` bytes (None: any); nothing is allocated before that is known.

    Raises FileNotFoundError, NotThatFileError, StorageError if it can't be read, MemoryError.
    """
    with open_source(storage, name, size, follow_links=follow_links) as source:
        return source.memory()


def digest_of(storage: Storage, name: str, size: int) -> str:
    """xxh3-128 in hex of the whole file, in bounded memory. Raises like `open_bytes`."""
    with open_source(storage, name, size) as source:
        if source.is_mapped:
            with source.memory() as memory:
                return xxhash.xxh3_128_hexdigest(memory.view)
        digest = xxhash.xxh3_128()
        window = room(min(source.size, THREADS * _BLOCK))
        for begin in range(0, source.size, len(window) or 1):
            part = window[: source.size - begin]
            source.fill(part, begin)
            digest.update(part)
        return digest.hexdigest()


class Source:
    """An open file. `read(begin, parts)` fills memory from `begin` on, on any thread, and says how far it came."""

    def __init__(
        self,
        name: str,
        size: int,
        read: Callable[[int, Sequence[memoryview]], int],
        handle: AbstractContextManager[object],
        mapped: Callable[[], mmap.mmap] | None = None,
    ) -> None:
        self.size = size
        self._name = name
        self._read = read
        self._handle = handle
        self._map = mapped

    @property
    def is_mapped(self) -> bool:
        return self._map is not None and self.size > 0

    def memory(self) -> FileMemory:
        if self._map is not None and self.size > 0:
            try:
                mapped = self._map()
                _advise(mapped, _POPULATE_READ)
            except OSError as error:  # a bad block, told here: found at a first touch it would end the process
                raise _unreadable(self._name, error) from error
            return FileMemory(memoryview(mapped), mapped)
        out = room(self.size)
        self.fill(out, 0)
        return FileMemory(out)

    def fill(self, out: memoryview, begin: int) -> None:
        blocks = range(0, len(out), _BLOCK)
        if len(blocks) <= 1:
            self._fill_block(out, begin)
            return
        with ThreadPoolExecutor(min(THREADS, len(blocks)), thread_name_prefix="checkpoint-read") as pool:
            for _ in pool.map(lambda at: self._fill_block(out[at : at + _BLOCK], begin + at), blocks):
                pass

    def _fill_block(self, out: memoryview, begin: int) -> None:
        self.scatter([out], begin)

    def scatter(self, parts: Sequence[memoryview], begin: int) -> None:
        """Fill `parts`, one after another, with what stands in the file from `begin` on; on any thread."""
        parts = _after(parts, 0)
        while parts:
            try:
                count = self._read(begin, parts)
            except OSError as error:
                raise _unreadable(self._name, error) from error
            if count == 0:
                raise NotThatFileError(f"it ends at byte {begin}: it was cut while it was read")
            begin += count
            parts = _after(parts, count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.__exit__(kind, error, trace)


def _after(parts: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    """What is left of `parts` when the first `count` bytes are filled."""
    for number, part in enumerate(parts):
        if count < len(part):
            return [part[count:], *parts[number + 1 :]]
        count -= len(part)
    return ()


def open_source(storage: Storage, name: str, size: int | None, *, follow_links: bool = False) -> Source:
    """The file `name`, which must have `size` bytes (None: any). Raises like `open_bytes`."""
    source = _open_local(storage.path(name), follow_links) if storage.is_local else _open_remote(storage, name)
    if size is not None and source.size != size:
        with source:
            raise NotThatFileError(f"it has {source.size} bytes instead of {size}: it was cut or replaced")
    return source


def _open_local(path: str, follow_links: bool) -> Source:
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe in its place must not keep us waiting
    try:
        file = os.open(path, flags if follow_links else flags | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise NotThatFileError("it is a symbolic link, which no checkpoint holds") from error
        raise _unreadable(path, error) from error
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        os.close(file)
        raise NotThatFileError("it is a folder or a device, not a file")
    handle = os.fdopen(file, "rb", buffering=0)

    def mapped() -> mmap.mmap:
        try:
            return mmap.mmap(file, status.st_size, access=mmap.ACCESS_COPY)
        except ValueError as error:
            raise NotThatFileError("it was cut while it was opened") from error

    return Source(
        path,
        status.st_size,
        lambda begin, parts: os.preadv(file, parts, begin),
        handle,
        None if is_network(status.st_dev) else mapped,
    )


def _open_remote(storage: Storage, name: str) -> Source:
    path = storage.path(name)
    stream = storage.open_input(name)

    def read(begin: int, parts: Sequence[memoryview]) -> int:
        out = parts[0]
        try:
            data = stream.read_at(len(out), begin)
        except OSError as error:
            if storage.exists(name):
                raise
            raise FileNotFoundError(f"{path!r} was removed while it was read") from error
        out[: len(data)] = data
        return len(data)

    try:
        size = int(stream.size())
    except OSError as error:
        with stream:
            raise _unreadable(path, error) from error
    return Source(path, size, read, stream)


def _unreadable(path: str, error: OSError) -> OSError | StorageError:
    if isinstance(error, FileNotFoundError):
        return error
    return StorageError(f"Can't read {path!r}: {error}", hint="Check that you may read it and that the disk is well.")


def _advise(memory: mmap.mmap, advice: int) -> None:
    """madvise; a kernel that does not know the advice is no error."""
    try:
        memory.madvise(advice)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def is_network(device: int) -> bool:
    """Whether files of this device number lie on another machine (as far as /proc tells)."""
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                fields = line.split()
                if fields[2] == wanted:
                    return _NETWORK.fullmatch(fields[fields.index("-") + 1]) is not None
    except OSError:
        return False
    return False
