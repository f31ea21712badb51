"""Files read into memory that lies in many places, digested on the way: every byte is fetched once. No torch.

In: open files, where the parts of each go, the digest that each has to have. Out: whether all of them have it; until
then what was read is unproven. A few threads take block after block, and what a thread has just read is still in its
core's cache when it is digested.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import xxhash

from ray_tracking.checkpoint.mapping import Source
from ray_tracking.checkpoint.memory import address_of

_BLOCK = 2 << 20
"""A huge page: two threads then never provide the same one."""
_THREADS = max(2, min(4, os.cpu_count() or 1))
_MOST_PARTS = 512
"""In one call; Linux takes 1024."""

Block = tuple[int, list[memoryview]]
"""Where it begins in the file, and where it goes."""


@dataclass(frozen=True, slots=True)
class Reading:
    """`head`: the file's first bytes, read before; `parts`: where the rest goes, in the file's order, all of it."""

    source: Source
    head: bytes
    parts: Sequence[memoryview]
    digest: str
    """xxh3-128 in hex of the whole file."""


def read_all(readings: Sequence[Reading]) -> bool:
    """Fill the parts. False if a file is not the one that its digest was taken of.

    Raises what reading raises; no thread writes to the parts any more then either.
    """
    pending = _Pending([_File(reading) for reading in readings])
    helpers = min(_THREADS, sum(len(file.blocks) for file in pending.files)) - 1
    with ThreadPoolExecutor(max(helpers, 1), thread_name_prefix="checkpoint-read") as pool:
        helping = [pool.submit(pending.work) for _ in range(helpers)]
        pending.work()
        for helper in helping:
            helper.result()
    if pending.error is not None:
        raise pending.error
    return all(file.digest.hexdigest() == file.reading.digest for file in pending.files)


class _File:
    """How far a file has come. All but `digest` is for who holds the lock."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.blocks = list(_blocks(reading.parts, len(reading.head)))
        self.digest = xxhash.xxh3_128(reading.head)
        self.taken = 0
        """Blocks that a thread has read or reads."""
        self.readers = 0
        self.digested = 0
        self.digesting = False
        """Whether a thread is at it."""
        self.waiting: set[int] = set()
        """Blocks that are read and not digested."""

    @property
    def left(self) -> int:
        return len(self.blocks) - self.taken


class _Pending:
    """What is still to be done, shared by the threads."""

    def __init__(self, files: Sequence[_File]) -> None:
        self.files = files
        self.error: BaseException | None = None
        self._lock = threading.Lock()

    def work(self) -> None:
        """Read and digest until nothing is left, or a thread had an error."""
        try:
            while (taken := self._take()) is not None:
                file, number = taken
                begin, parts = file.blocks[number]
                file.reading.source.scatter(parts, begin)
                if self._has_turn(file, number):
                    self._digest(file)
        except BaseException as error:  # noqa: BLE001 - raised by who waits for all threads
            with self._lock:
                self.error = self.error or error

    def _take(self) -> tuple[_File, int] | None:
        """The next block, if there is one of a file that no other thread reads: a file is digested in its order."""
        with self._lock:
            files = [file for file in self.files if file.left]
            if not files or self.error is not None:
                return None
            file = min(files, key=lambda each: (each.readers, -each.left))
            file.readers += 1
            file.taken += 1
            return file, file.taken - 1

    def _has_turn(self, file: _File, number: int) -> bool:
        with self._lock:
            file.readers -= 1
            file.waiting.add(number)
            if file.digesting:
                return False
            file.digesting = True
            return True

    def _digest(self, file: _File) -> None:
        """As far as it is read without a gap."""
        while True:
            with self._lock:
                if file.digested not in file.waiting:
                    file.digesting = False
                    return
                number = file.digested
                file.waiting.remove(number)
                file.digested += 1
            for part in file.blocks[number][1]:
                file.digest.update(part)


def _blocks(parts: Sequence[memoryview], begin: int) -> Iterator[Block]:
    """The parts cut into blocks, which end where a huge page of memory does."""
    block: list[memoryview] = []
    size = 0
    for part in parts:
        if not len(part):
            continue
        address, at = address_of(part), 0
        while at < len(part):
            piece = part[at : at + _BLOCK - (address + at) % _BLOCK]
            if block and (size + len(piece) > _BLOCK or len(block) == _MOST_PARTS):
                yield begin, block
                begin, block, size = begin + size, [], 0
            block.append(piece)
            size += len(piece)
            at += len(piece)
    if block:
        yield begin, block
