"""Shared memory for checkpoints: provided by the kernel ahead of time, readable by another process. No torch.

In: sizes. Out: memory with a descriptor that can be sent.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import tempfile
from typing import Any

PAGE = mmap.PAGESIZE
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, Linux 5.14
_STEP_BYTES = 16 << 20


class Arena:
    """Anonymous shared memory of at least `size` bytes, held by a descriptor that can be sent to another process."""

    def __init__(self, size: int) -> None:
        self.size = -(-size // PAGE) * PAGE
        self.fd = _anonymous_file()
        try:
            os.ftruncate(self.fd, self.size)
            self.memory = memoryview(mmap.mmap(self.fd, self.size))
        except (OSError, ValueError):
            os.close(self.fd)
            raise

    def close(self) -> None:
        """Let go of the descriptor; the memory goes with the last view of it, here and in the other process."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def fault_in(memory: memoryview) -> None:
    """Make the kernel provide and map all pages now, in steps: a first touch costs many times the copy itself.

    Holds no GIL.
    """
    populate = _madvise()
    if populate is None or not memory:
        return
    address = address_of(memory)
    for begin in range(0, len(memory), _STEP_BYTES):
        size = min(_STEP_BYTES, len(memory) - begin)
        if populate(ctypes.c_void_p(address + begin), ctypes.c_size_t(size), _POPULATE_WRITE):
            return  # a kernel that does not know it: the first save touches the pages


def address_of(memory: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("ray-tracking-checkpoint", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile(prefix="ray-tracking-checkpoint-") as file:  # no Linux: a file without a name
        return os.dup(file.fileno())


@functools.cache
def _madvise() -> Any:
    return getattr(ctypes.CDLL(None), "madvise", None)
