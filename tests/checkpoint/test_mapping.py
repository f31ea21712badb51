from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from pyarrow import fs

from ray_tracking.checkpoint import mapping
from ray_tracking.checkpoint.mapping import NotThatFileError, digest_of, open_bytes, room
from ray_tracking.errors import StorageError
from ray_tracking.storage import Storage

from .conftest import open_files

CONTENT = os.urandom(300_001)


@pytest.fixture(params=["mapped", "network file system", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The file `f` on each kind of storage, read in many small blocks where it is read."""
    (tmp_path / "f").write_bytes(CONTENT)
    monkeypatch.setattr(mapping, "_BLOCK", 7_000)
    if request.param == "network file system":
        monkeypatch.setattr(mapping, "is_network", lambda device: True)
    if request.param == "object store":
        return Storage(fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem()), "/", "elsewhere")
    return Storage.open(tmp_path)


def maps() -> str:
    return Path("/proc/self/maps").read_text()


def test_the_whole_file(storage: Storage) -> None:
    with open_bytes(storage, "f", len(CONTENT)) as memory:
        assert memory.view == CONTENT
        memory.view[:3] = b"new"
    assert storage.read_bytes("f") == CONTENT, "what is written to the memory never reaches the file"
    assert digest_of(storage, "f", len(CONTENT)) == xxhash.xxh3_128_hexdigest(CONTENT)


@pytest.mark.parametrize("size", [0, 1, 6_999, 7_000, 7_001, 28_000, 28_001])
def test_any_size(storage: Storage, size: int) -> None:
    storage.write_bytes("g", CONTENT[:size])
    with open_bytes(storage, "g", None) as memory:
        assert memory.view == CONTENT[:size]
    assert digest_of(storage, "g", size) == xxhash.xxh3_128_hexdigest(CONTENT[:size])


def test_another_size_is_refused_before_anything_is_allocated(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapping, "room", lambda size: pytest.fail("allocated"))
    for size in (0, len(CONTENT) - 1, len(CONTENT) + 1, 1 << 60):
        for read in (open_bytes, digest_of):
            with pytest.raises(NotThatFileError, match=f"has 300001 bytes instead of {size}"):
                read(storage, "f", size)


def test_a_file_that_is_not_there(storage: Storage) -> None:
    for read in (open_bytes, digest_of):
        with pytest.raises(FileNotFoundError):
            read(storage, "g", 3)


def test_what_is_no_file(tmp_path: Path) -> None:
    storage = Storage.open(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "f").write_bytes(b"abc")
    (tmp_path / "link").symlink_to(tmp_path / "f")
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("folder", "a folder"), ("pipe", "a folder or a device"), ("link", "a symbolic link")):
        with pytest.raises(NotThatFileError, match=said):
            open_bytes(storage, name, 3)
    with open_bytes(storage, "link", 3, follow_links=True) as memory:
        assert memory.view == b"abc"


def test_a_file_cut_while_it_is_read(storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if mapping.is_network(0) or storage.uri == "elsewhere":
        allocate = room

        def cut(size: int) -> memoryview:
            os.truncate(tmp_path / "f", 50_000)
            return allocate(size)

        monkeypatch.setattr(mapping, "room", cut)
        with pytest.raises(NotThatFileError, match="ends at byte 50000"):
            open_bytes(storage, "f", len(CONTENT))
    else:
        fstat = os.fstat

        def cut_after(file: int) -> os.stat_result:
            status = fstat(file)
            os.truncate(tmp_path / "f", 50_000)
            return status

        monkeypatch.setattr(os, "fstat", cut_after)
        with pytest.raises(NotThatFileError, match="cut while it was opened"):
            open_bytes(storage, "f", len(CONTENT))


def test_an_error_of_the_disk_has_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(CONTENT)
    storage = Storage.open(tmp_path)

    def fails(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(mapping, "_advise", fails)
    with pytest.raises(StorageError, match=f"{tmp_path}/f.*Input/output error"):
        open_bytes(storage, "f", None)
    monkeypatch.undo()
    monkeypatch.setattr(mapping, "is_network", lambda device: True)
    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(StorageError, match=f"{tmp_path}/f.*Input/output error"):
        open_bytes(storage, "f", None)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_mapping_goes_when_it_is_closed(tmp_path: Path) -> None:
    (tmp_path / "mapped-file").write_bytes(CONTENT)
    memory = open_bytes(Storage.open(tmp_path), "mapped-file", None)
    assert "mapped-file" in maps()
    assert open_files(tmp_path) != []
    memory.close()
    assert "mapped-file" not in maps()
    assert open_files(tmp_path) == []


def test_a_tensor_that_outlives_the_mapping_no_longer_depends_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mapped-file"
    path.write_bytes(torch.arange(100_000.0).numpy().tobytes())
    memory = open_bytes(Storage.open(tmp_path), "mapped-file", None)
    kept = torch.frombuffer(memory.view, dtype=torch.float32)
    memory.close()
    with open(path, "r+b") as file:
        file.write(bytes(400_000))
    path.unlink()
    assert torch.equal(kept, torch.arange(100_000.0))
    del kept
    assert "mapped-file" not in maps()


def test_room_is_private_writable_and_given_back() -> None:
    for size in (0, 1, 4 << 20, (4 << 20) + 5):
        memory = room(size)
        assert len(memory) == size
        assert not any(memory[:: 1 << 12])
        memory[-1:] = b"x" * len(memory[-1:])
    before = resident()
    memory = room(64 << 20)
    memory[:] = b"x" * len(memory)
    assert resident() > before + (60 << 20)
    del memory
    assert resident() < before + (30 << 20)
    with pytest.raises(MemoryError):
        room(1 << 60)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_reads_run_at_once_where_they_are_no_mapping(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    if storage.uri != "elsewhere":
        return
    together = threading.Barrier(2, timeout=60)
    fill = mapping.Source._fill_block
    waited = []

    def wait(self: Any, out: memoryview, begin: int) -> None:
        if begin in (0, 7_000):
            waited.append(together.wait())
        fill(self, out, begin)

    monkeypatch.setattr(mapping.Source, "_fill_block", wait)
    with open_bytes(storage, "f", None) as memory:
        assert memory.view == CONTENT
    assert len(waited) == 2


def test_which_file_systems_lie_on_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {"nfs4": True, "fuse.sshfs": True, "ext4": False, "tmpfs": False, "cifs": True, "overlay": False}
    real = open
    for kind, expected in lines.items():
        (tmp_path / "mountinfo").write_text(
            f"22 1 0:99 / /x rw - {'ext4' if expected else 'nfs4'} a rw\n"
            f"36 35 0:45 / /data rw,noatime master:1 - {kind} server:/x rw\n"
        )
        monkeypatch.setattr("builtins.open", lambda *_, **options: real(tmp_path / "mountinfo", **options))
        assert mapping.is_network(os.makedev(0, 45)) is expected
        assert mapping.is_network(os.makedev(0, 46)) is False
        monkeypatch.undo()
