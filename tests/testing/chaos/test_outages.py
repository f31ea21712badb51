"""What is taken away is really away, and back afterwards: a folder, MLflow's server, the space on a disk."""

from __future__ import annotations

import errno
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.outages import FolderOutage, FullDisk, ServerOutage, folder_of
from ray_tracking.testing.chaos.plan import Part
from ray_tracking.testing.chaos.processes import Process, snapshot
from ray_tracking.testing.chaos.server import MLflowServer
from ray_tracking.testing.chaos.tmpfs import Tmpfs, why_no_tmpfs
from ray_tracking.tracking.cursor import BackendState, Cursor
from tests.tracking.fakes import wait_until


def test_a_folder_is_away_with_its_service_and_comes_back_whole(tmp_path: Path) -> None:
    run, folder = Storage.open(tmp_path / "run"), tmp_path / "wandb"
    folder.mkdir()
    (folder / "file").write_text("kept")
    Cursor("wandb", state=BackendState.OK, location=str(folder)).save(run)
    assert folder_of(run, Part.WANDB) == folder
    assert folder_of(run, Part.TENSORBOARD) is None
    service = subprocess.Popen(["/usr/lib/wandb-core", "1000"], executable="/bin/sleep")

    def find(part: Part) -> list[Process]:
        return [one for one in snapshot().values() if one.pid == service.pid and one.is_part(part)]

    wait_until(lambda: find(Part.WANDB))  # Popen returns a moment before the kernel shows the new command line
    outage = FolderOutage(Part.WANDB, folder, run, find)
    assert outage.begin() == [service.pid]
    assert service.wait(10) == -signal.SIGKILL
    with pytest.raises(OSError, match="Not a directory"):
        (folder / "new").touch()
    assert outage.felt() is None
    Cursor("wandb", state=BackendState.FAILING, location=str(folder)).save(run)
    assert outage.felt() == "failing"
    outage.end()
    assert (folder / "file").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "wandb"]


def test_mlflow_is_gone_and_comes_back_with_what_it_held(tmp_path: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    from mlflow import MlflowClient

    server = MLflowServer(tmp_path)
    server.start()
    try:
        client = MlflowClient(server.uri)
        experiment = client.create_experiment("kept")
        outage = ServerOutage(server, Storage.open(tmp_path))
        assert outage.begin()
        assert not server._answers()
        outage.end()
        assert client.get_experiment(experiment).name == "kept"
    finally:
        server.kill()
    assert server.kill() == []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Tmpfs]:
    if why := why_no_tmpfs():
        pytest.skip(why)
    disk = Tmpfs(tmp_path / "disk")
    disk.mount()
    yield disk
    disk.unmount()


def test_a_full_disk_takes_nothing_and_then_all_again(disk: Tmpfs) -> None:
    file = disk.folder / "file"
    file.write_bytes(b"x" * 100_000)
    printed = "No space left on device, said before"
    outage = FullDisk(disk, lambda: printed)
    outage.begin()
    assert disk.left == 0
    with pytest.raises(OSError, match="No space left") as full:
        (disk.folder / "more").write_bytes(b"x" * 100_000)
    assert full.value.errno == errno.ENOSPC
    assert outage.felt() is None
    printed += "\nOSError: No space left on device"
    assert outage.felt() == "No space left on device"
    outage.end()
    assert file.read_bytes() == b"x" * 100_000
    (disk.folder / "more").write_bytes(b"x" * 100_000)
