"""Copies of checkpoints in a node's memory: what is read from them, what is kept of them, and what they never do."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from ray_tracking.checkpoint import nearby as module
from ray_tracking.checkpoint.keys import Key, Keyring
from ray_tracking.checkpoint.manager import CheckpointManager
from ray_tracking.checkpoint.nearby import Nearby
from ray_tracking.checkpoint.nearby_folders import claim, leftovers
from ray_tracking.checkpoint.node_memory import NodeMemory
from ray_tracking.checkpoint.reader import OpenCheckpoint
from ray_tracking.checkpoint.sealing import Sealing
from ray_tracking.checkpoint.store import CheckpointStore
from ray_tracking.checkpoint.writer import CheckpointWriter
from ray_tracking.errors import CheckpointCorruptError
from ray_tracking.storage import Storage

from .conftest import snapshot
from .copies import copied, restored, save, write_part

FIRST, SECOND = "attempt-001", "attempt-002"


@pytest.fixture
def nearby(tmp_path: Path) -> Nearby:
    root = tmp_path / "memory"
    root.mkdir(mode=0o700)
    return Nearby(str(root))


def store_of(tmp_path: Path, attempt: str = FIRST) -> CheckpointStore:
    return CheckpointStore(Storage.open(tmp_path / "run"), attempt)


def test_restored_without_the_files_on_storage(tmp_path: Path, nearby: Nearby) -> None:
    store = store_of(tmp_path)
    info = save(store, nearby, 5)
    for name in info.manifests[0].files:
        os.truncate(store.storage.path(f"{info.folder}/{name}"), 0)
    assert restored(store, info, nearby) == (5.0, info.size)
    with pytest.raises(CheckpointCorruptError):
        restored(store, info, None)


def test_files_are_for_this_user_alone(tmp_path: Path, nearby: Nearby) -> None:
    before = os.umask(0)
    try:
        save(store_of(tmp_path), nearby, 5)
    finally:
        os.umask(before)
    below = list(Path(nearby.storage.root).rglob("*"))
    assert {path.stat().st_mode & 0o777 for path in below if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in below if path.is_dir()} == {0o700}


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_what_is_sealed_on_storage_is_sealed_in_memory(tmp_path: Path, nearby: Nearby, compression: str | None) -> None:
    keyring = Keyring(Key(bytes(range(32))))
    store = store_of(tmp_path)
    info = save(store, nearby, 5, sealing=Sealing(compression, keyring.new_data_key()))  # type: ignore[arg-type]
    for name in info.manifests[0].files:
        copy = Path(nearby.storage.path(f"{info.folder}/{name}"))
        assert copy.suffix == ".enc"
        assert copy.read_bytes() == Path(store.storage.path(f"{info.folder}/{name}")).read_bytes()
    assert restored(store, info, nearby, keyring=keyring) == (5.0, info.size)


def test_a_flipped_bit_in_memory(tmp_path: Path, nearby: Nearby, capsys: pytest.CaptureFixture[str]) -> None:
    """Each file in turn: that one is read from storage, and it is said."""
    store = store_of(tmp_path)
    info = save(store, nearby, 5)
    for name, entry in info.manifests[0].files.items():
        copy = Path(nearby.storage.path(f"{info.folder}/{name}"))
        whole = copy.read_bytes()
        copy.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        assert restored(store, info, nearby) == (5.0, info.size - entry.size)
        assert f"{name} is not what was saved" in (said := capsys.readouterr().err)
        assert "storage is read" in said
        copy.write_bytes(whole[:-1])
        assert restored(store, info, nearby) == (5.0, info.size - entry.size)
        assert f"{name} is not what was saved" in capsys.readouterr().err
        copy.unlink()
        copy.symlink_to(store.storage.path(f"{info.folder}/{name}"))
        assert restored(store, info, nearby) == (5.0, info.size - entry.size)
        assert "symbolic link" in capsys.readouterr().err
        copy.unlink()
        copy.write_bytes(whole)
    assert restored(store, info, nearby) == (5.0, info.size)


def test_a_file_that_memory_lacks_is_read_from_storage_without_a_word(
    tmp_path: Path, nearby: Nearby, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_of(tmp_path)
    info = save(store, nearby, 5, world_size=2)
    (first, second) = (sum(entry.size for entry in manifest.files.values()) for manifest in info.manifests)
    for name in info.manifests[1].files:  # another node wrote them
        os.unlink(nearby.storage.path(f"{info.folder}/{name}"))
    assert restored(store, info, nearby) == (5.0, first)
    assert first + second == info.size
    shutil.rmtree(nearby.storage.path(FIRST))
    assert restored(store, info, nearby) == (5.0, 0)
    assert capsys.readouterr().err == ""


def test_a_stale_copy_under_the_same_name_is_never_loaded(
    tmp_path: Path, nearby: Nearby, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's directory was deleted and a run of the same id begun: same folder, other weights."""
    save(store_of(tmp_path), nearby, 5)
    stale = tmp_path / "stale"
    shutil.copytree(nearby.storage.root, stale)
    shutil.rmtree(tmp_path / "run")
    store = store_of(tmp_path)
    folder = store.folder_of(5)
    store.write_snapshot(folder, snapshot(5, epoch=3))
    info = store.inspect(folder).info
    assert info is not None
    (path,) = stale.rglob("model.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x11")
    shutil.rmtree(nearby.storage.root)
    stale.rename(nearby.storage.root)
    value, from_memory = restored(store, info, nearby)
    assert value == 5.0
    assert from_memory < info.size
    assert "passed over" in capsys.readouterr().err


def test_another_attempts_copy_is_not_taken_for_this_ones(tmp_path: Path, nearby: Nearby) -> None:
    save(store_of(tmp_path), nearby, 8)
    second = store_of(tmp_path, SECOND)
    folder = second.folder_of(8)
    second.write_snapshot(folder, snapshot(8))
    info = second.inspect(folder).info
    assert info is not None
    assert restored(second, info, nearby) == (8.0, 0)


def test_only_the_newest_is_kept_beside_the_one_being_written(tmp_path: Path, nearby: Nearby) -> None:
    store = store_of(tmp_path)
    for step in (5, 10, 15):
        save(store, nearby, step, world_size=2)
    assert copied(nearby) == [f"{FIRST}/step-000010", f"{FIRST}/step-000015"]
    write_part(store, nearby, store.folder_of(20), 20, rank=0, world_size=2, commit=False)  # killed before its commit
    assert copied(nearby) == [f"{FIRST}/step-000015", f"{FIRST}/step-000020"]
    again = store_of(tmp_path, SECOND)
    write_part(again, nearby, again.folder_of(20), 20, rank=0, world_size=2)
    assert copied(nearby) == [f"{FIRST}/step-000015", f"{SECOND}/step-000020"]
    save(again, nearby, 25, world_size=1)
    assert copied(nearby) == [f"{SECOND}/step-000020", f"{SECOND}/step-000025"], "at another world size too"


def test_a_slower_rank_does_not_remove_what_a_faster_one_writes(tmp_path: Path, nearby: Nearby) -> None:
    store = store_of(tmp_path)
    save(store, nearby, 5, world_size=2)
    write_part(store, nearby, store.folder_of(15), 15, rank=0, world_size=2)
    write_part(store, nearby, store.folder_of(10), 10, rank=1, world_size=2)
    assert copied(nearby) == [f"{FIRST}/step-{step:06d}" for step in (5, 10, 15)]
    write_part(store, nearby, store.folder_of(15), 15, rank=1, world_size=2)
    info = store.inspect(store.folder_of(15)).info
    assert info is not None
    assert restored(store, info, nearby)[1] == info.size
    save(store, nearby, 20, world_size=2)
    assert copied(nearby) == [f"{FIRST}/step-{step:06d}" for step in (15, 20)]


def test_without_attempt_folders(tmp_path: Path, nearby: Nearby) -> None:
    store = CheckpointStore(Storage.open(tmp_path / "run"))
    for step in (5, 10, 15):
        info = save(store, nearby, step)
    assert copied(nearby) == ["step-000010", "step-000015"]
    assert restored(store, info, nearby) == (15.0, info.size)


# -- room ------------------------------------------------------------------------------------------


def test_no_room_is_said_once_and_what_is_there_goes(
    tmp_path: Path, nearby: Nearby, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = store_of(tmp_path)
    save(store, nearby, 5)
    monkeypatch.setattr(module, "look", lambda folder: NodeMemory(1 << 40, 100, 1000))
    for step in (10, 15):
        info = save(store, nearby, step)
    assert copied(nearby) == [], "the copy of step 5 would be in the way of everyone, and for nothing"
    assert capsys.readouterr().err.count("no copy of the checkpoint in this node's memory") == 1
    assert restored(store, info, nearby) == (15.0, 0)
    monkeypatch.undo()
    info = save(store, nearby, 20)
    assert restored(store, info, nearby) == (20.0, info.size)


def test_room_that_others_have_a_claim_to(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    reserved = Nearby(str(tmp_path / "memory"), reserved=1 << 62)
    save(store_of(tmp_path), reserved, 5)
    assert copied(reserved) == []


def test_room_that_is_gone_in_the_middle(tmp_path: Path, nearby: Nearby, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others take it while a file is being copied: that file's copy is gone, the save is not."""
    looks: list[str] = []

    def shrinking(folder: str) -> NodeMemory:
        looks.append(folder)
        return NodeMemory(1 << 40, 1 << 40 if len(looks) == 1 else 0, 1 << 40)

    monkeypatch.setattr(module, "look", shrinking)
    monkeypatch.setattr(module, "_CHECK_BYTES", 64)
    store = store_of(tmp_path)
    info = save(store, nearby, 5)
    assert len(looks) > 1
    assert store.verify(info) == []
    assert restored(store, info, nearby)[0] == 5.0
    assert not list(Path(nearby.storage.root).rglob(".tmp-*"))


def test_a_machine_that_does_not_tell_its_memory(
    tmp_path: Path, nearby: Nearby, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unknown(folder: str) -> NodeMemory:
        raise KeyError("MemAvailable:")

    monkeypatch.setattr(module, "look", unknown)
    info = save(store_of(tmp_path), nearby, 5)
    assert copied(nearby) == []
    assert "can't be told" in capsys.readouterr().err
    assert info.step == 5


# -- the writer process ----------------------------------------------------------------------------


def managed(tmp_path: Path, nearby: Nearby) -> CheckpointManager:
    store = CheckpointStore(Storage.open(tmp_path / "run"))
    kept = CheckpointManager(store)
    kept._writer = CheckpointWriter(store, nearby=nearby)
    return kept


def test_by_the_writer_process(tmp_path: Path) -> None:
    shared = tmp_path / "shm"
    shared.mkdir()
    store = CheckpointStore(Storage.open(tmp_path / "run"))
    claimed = claim(store.storage, shared)
    nearby = Nearby(str(claimed.path), 0, claimed)
    with managed(tmp_path, nearby) as kept:
        for step in (1, 2, 3):
            kept.save_checkpoint(model={"w": torch.full((100_000,), float(step))}, step=step, blocking=True)
        assert copied(nearby) == ["step-000002", "step-000003"]
        copies = Path(nearby.storage.path("step-000003"))
        on_storage = Path(store.storage.path("step-000003"))
        assert {path.name: path.read_bytes() for path in copies.iterdir()} == {
            path.name: path.read_bytes() for path in on_storage.iterdir()
        }
    nearby.release()
    assert leftovers(shared) == []


def half_copied(root: Path) -> Sequence[str]:
    return [file for _, _, files in os.walk(root) for file in files if file.startswith(".tmp-")]


def test_a_writer_that_is_killed_while_it_copies(tmp_path: Path, nearby: Nearby) -> None:
    """It is started again, writes the part once more, and leaves nothing half-copied."""
    root = Path(nearby.storage.root)
    with managed(tmp_path, nearby) as kept:
        kept.save_checkpoint(model={"w": torch.zeros(10)}, step=1, blocking=True)
        for step in range(2, 12):  # where we are too slow, it has copied all of it
            kept.save_checkpoint(model={"w": torch.ones(32 << 20)}, step=step)
            _, saved = kept._written[-1]
            while not half_copied(root) and not saved.done():
                time.sleep(0.001)
            process = kept._writer._process
            assert process is not None
            os.kill(process.pid, signal.SIGKILL)
            kept.wait()
            if kept._writer._process is not process:
                break
        assert kept._writer._process is not process
        assert copied(nearby) == [f"step-{step - 1:06d}", f"step-{step:06d}"]
        assert not list(root.rglob(".tmp-*"))
        (info,) = [info for info in kept.list_checkpoints() if info.step == step]
        with OpenCheckpoint(kept.store.storage, info, None, nearby.storage) as opened:
            assert torch.equal(opened.states()["model"]["w"], torch.ones(32 << 20))
            assert opened.from_nearby == info.size


def test_copies_that_someone_removes_under_the_writer(tmp_path: Path, nearby: Nearby) -> None:
    with managed(tmp_path, nearby) as kept:
        kept.save_checkpoint(model={"w": torch.zeros(10)}, step=1, blocking=True)
        shutil.rmtree(nearby.storage.root)
        kept.save_checkpoint(model={"w": torch.zeros(10)}, step=2, blocking=True)
        assert [info.step for info in kept.list_checkpoints()] == [1, 2]
        assert kept.verify() == {1: [], 2: []}
