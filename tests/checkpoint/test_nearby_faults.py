"""Killed at every operation of a copy, and a memory that is really full: storage alone says what there is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_tracking.checkpoint import nearby as module
from ray_tracking.checkpoint.nearby import Nearby
from ray_tracking.checkpoint.node_memory import NodeMemory
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.errors import StorageError
from ray_tracking.storage import Storage
from ray_tracking.writing import Writing

from .conftest import open_files
from .copies import copied, restored, save, write_part
from .faults import Killed, KillingStorage, kill_points, limited_disk


class KillingOs:
    """`os` and `shutil` as the module sees them: Killed at call number `at` that changes files, before, in or after it.

    In the middle: half of a block is written, half of a folder removed; what is one step for the kernel has no middle.
    """

    def __init__(self, at: int, when: str) -> None:
        self.at, self.when, self.count = at, when, 0
        changing: dict[str, Callable[..., Any] | None] = {
            "makedirs": None, "open": None, "close": None, "replace": None, "unlink": None,
            "write": lambda file, block: os.write(file, block[: len(block) // 2]),
            "rmtree": _half_of_a_folder,
        }  # fmt: skip
        self._calls = {name: self._killing(name, half) for name, half in changing.items()}

    def __getattr__(self, name: str) -> Any:
        return self._calls.get(name) or getattr(os, name)

    def _killing(self, name: str, half: Callable[..., Any] | None) -> Callable[..., Any]:
        real = getattr(os, name, None) or getattr(shutil, name)

        def call(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            now = self.count == self.at
            if now and self.when == "before":
                raise Killed
            if now and self.when == "during" and half is not None:
                half(*arguments, **options)
                raise Killed
            result = real(*arguments, **options)
            if now and self.when == "after":
                raise Killed
            return result

        return call


def _half_of_a_folder(path: str, **_: Any) -> None:
    files = sorted(os.listdir(path))
    for file in files[: len(files) // 2]:
        os.unlink(os.path.join(path, file))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.mkdir()
    return path


def test_killed_at_any_operation_of_a_copy(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks; one is killed as it copies. Then the newest complete checkpoint is restored, and saving goes on."""
    store, nearby = CheckpointStore(Storage.open(tmp_path / "run"), "attempt-001"), Nearby(str(root))
    save(store, nearby, 5, world_size=2)
    save(store, nearby, 10, world_size=2)
    write_part(store, nearby, store.folder_of(15), 15, rank=1, world_size=2)
    before = {path: shutil.copytree(path, tmp_path / f"before-{path.name}") for path in (tmp_path / "run", root)}
    for number, when in kill_points():
        for path, copy in before.items():
            shutil.rmtree(path)
            shutil.copytree(copy, path)
        killing = KillingOs(number, when)
        with monkeypatch.context() as patched:
            patched.setattr(module, "os", killing)
            patched.setattr(module, "shutil", killing)
            try:
                write_part(store, nearby, store.folder_of(15), 15, rank=0, world_size=2)
            except Killed:
                survived = False
            else:
                survived = True
        if survived and killing.count >= number:
            continue  # what is one step for the kernel has no middle
        again = CheckpointStore(Storage.open(tmp_path / "run"), "attempt-002")
        newest = again.checkpoints()[-1]
        assert newest.step in (10, 15)
        assert restored(again, newest, nearby)[0] == newest.step
        last = save(again, nearby, 20, world_size=2)
        assert copied(nearby)[-1] == "attempt-002/step-000020"
        assert len(copied(nearby)) <= 2
        assert not list(root.rglob(".tmp-*")), "what was left is cleaned up"
        assert restored(again, last, nearby) == (20.0, last.size)
        if survived and killing.count < number:
            break
    assert number > 12


def test_a_commit_that_fails_leaves_nothing_in_memory(tmp_path: Path) -> None:
    """A file without a name keeps its memory for as long as it is open."""
    open_before: list[str] = []

    class Failing(Writing):
        def __init__(self) -> None: ...

        def write(self, block: bytes | memoryview) -> None: ...

        def commit(self) -> None:
            open_before.extend(open_files(tmp_path))
            raise StorageError("the last part was refused")

        def abandon(self) -> None: ...

    copy = module._FileCopy(str(tmp_path / "part"), 0, lambda size: True)
    with pytest.raises(StorageError), module._CopiedWriting(Failing(), copy) as writing:
        writing.write(b"x" * 1000)
    assert len(open_before) == 1
    assert os.listdir(tmp_path) == []
    assert open_files(tmp_path) == []


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_killed_at_any_operation_on_storage(tmp_path: Path, root: Path, when: str) -> None:
    """What storage does not have is not restored, whatever was copied; what it has can come from memory."""
    for number in range(1, 20):
        for path in (tmp_path / "run", root):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
        nearby = Nearby(str(root))
        store = CheckpointStore(Storage.open(tmp_path / "run"), "attempt-001")
        save(store, nearby, 5)
        killing = CheckpointStore(KillingStorage(tmp_path / "run", number, when), "attempt-001")
        try:
            write_part(killing, nearby, store.folder_of(10), 10)
        except Killed:
            survived = False
        else:
            survived = True
        newest = store.checkpoints()[-1]
        value, from_memory = restored(store, newest, Nearby(str(root)))
        assert value == newest.step
        assert from_memory == newest.size, "the newest complete one is in memory at any moment"
        if survived:
            assert newest.step == 10
            break
    assert number > 3


@pytest.fixture
def small_memory(tmp_path: Path) -> Iterator[Path]:
    """A memory file system of 64 KiB."""
    with limited_disk(tmp_path / "small", "64k") as disk:
        yield disk


def test_a_memory_that_is_full(tmp_path: Path, small_memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others filled it after we had looked: the save is whole, and no half of a copy stays."""
    filler = small_memory / "others"
    with filler.open("wb", buffering=0) as file:
        taken = file.write(bytes(1 << 20))
    assert taken <= 1 << 16, "the file system is larger than was asked for"
    monkeypatch.setattr(module, "look", lambda folder: NodeMemory(1 << 40, 1 << 40, 1 << 40))
    nearby = Nearby(str(small_memory))
    store = CheckpointStore(Storage.open(tmp_path / "run"))
    info = save(store, nearby, 5)
    assert store.verify(info) == []
    assert copied(nearby) == []
    assert restored(store, info, nearby) == (5.0, 0)
    filler.unlink()
    info = save(store, nearby, 10)
    assert restored(store, info, nearby) == (10.0, info.size)
