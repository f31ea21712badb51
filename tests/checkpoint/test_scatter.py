from __future__ import annotations

import os
import random
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import xxhash

from ray_tracking.checkpoint import mapping, scatter
from ray_tracking.checkpoint.mapping import NotThatFileError, open_source
from ray_tracking.checkpoint.scatter import Reading, read_all
from ray_tracking.errors import StorageError
from ray_tracking.storage import Storage

HEAD = 100


class Files:
    """Files of some sizes, and the memory that each is to be read into, in many places."""

    def __init__(self, root: Path, sizes: Sequence[int], seed: int) -> None:
        generator = random.Random(seed)
        self.contents = [generator.randbytes(size) for size in sizes]
        self.parts: list[list[memoryview]] = []
        self.open = ExitStack()
        self.readings = []
        for number, content in enumerate(self.contents):
            (root / str(number)).write_bytes(content)
            left, parts = len(content) - HEAD, []
            while left:
                size = min(generator.choice((0, 1, 4, 500, 40_000)), left)
                parts.append(memoryview(bytearray(size)))
                left -= size
            source = self.open.enter_context(open_source(Storage.open(root), str(number), len(content)))
            self.parts.append(parts)
            self.readings.append(Reading(source, content[:HEAD], parts, xxhash.xxh3_128_hexdigest(content)))

    @property
    def found(self) -> list[bytes]:
        return [content[:HEAD] + b"".join(parts) for content, parts in zip(self.contents, self.parts, strict=True)]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(scatter, "_BLOCK", 1 << 13)
    made = Files(tmp_path, [300_000, HEAD, 90_000], seed=1)
    with made.open:
        yield made


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_every_part_is_filled_and_every_byte_digested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, threads: int
) -> None:
    monkeypatch.setattr(scatter, "_BLOCK", 1 << 13)
    monkeypatch.setattr(scatter, "_MOST_PARTS", 3)
    monkeypatch.setattr(scatter, "_THREADS", threads)
    made = Files(tmp_path, [100_000, HEAD, HEAD + 1, 50_000], seed)
    with made.open:
        assert read_all(made.readings)
        assert made.found == made.contents
        for number, content in enumerate(made.contents):
            for at in {HEAD, (HEAD + len(content)) // 2, len(content) - 1} & {*range(HEAD, len(content))}:
                with (tmp_path / str(number)).open("r+b") as file:
                    for byte, good in ((content[at] ^ 1, False), (content[at], True)):
                        file.seek(at)
                        file.write(bytes([byte]))
                        file.flush()
                        assert read_all(made.readings) is good
            old = made.readings[number]
            made.readings[number] = replace(old, head=b"x" + old.head[1:])
            assert not read_all(made.readings)
            made.readings[number] = old


def test_nothing_to_read() -> None:
    assert read_all([])


def test_a_call_that_comes_less_far(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def short(file: int, parts: Sequence[memoryview], begin: int) -> int:
        return real(file, [parts[0][:7]] if len(parts[0]) else parts, begin)

    monkeypatch.setattr(os, "preadv", short)
    assert read_all(files.readings)
    assert files.found == files.contents


def test_a_file_that_is_cut(files: Files, tmp_path: Path) -> None:
    os.truncate(tmp_path / "0", 100_000)
    with pytest.raises(NotThatFileError, match="ends at byte 100000"):
        read_all(files.readings)


def test_no_thread_writes_on_after_an_error(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls, lock = os.preadv, [0], threading.Lock()

    def fails(file: int, parts: Sequence[memoryview], begin: int) -> int:
        with lock:
            calls[0] += 1
        if begin > 50_000:
            raise OSError(5, "Input/output error")
        return real(file, parts, begin)

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(StorageError, match="Input/output error"):
        read_all(files.readings)
    done, found = calls[0], files.found
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint-read")]
    assert (calls[0], files.found) == (done, found)
    assert done < sum(len(scatter._File(reading).blocks) for reading in files.readings)


def test_a_part_after_another() -> None:
    parts = [memoryview(bytearray(size)) for size in (3, 0, 2)]
    assert [len(part) for part in mapping._after(parts, 1)] == [2, 0, 2]
    assert [len(part) for part in mapping._after(parts, 3)] == [2]
    assert list(mapping._after(parts, 5)) == []
