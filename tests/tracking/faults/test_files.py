"""TensorBoard's and W&B's files where they can't be written for a while: no space, no permission, a folder gone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.tmpfs import Tmpfs, why_no_tmpfs
from ray_tracking.tracking import syncing
from ray_tracking.tracking.cursor import BackendState, Cursor
from ray_tracking.tracking.recorded import tracking_of
from tests.readback import comparable, tensorboard_points, wandb_points
from tests.tracking.fakes import wait_until
from tests.tracking.faults.conftest import SECONDS, Track, Tracked, journaled

NO_TMPFS = why_no_tmpfs()
needs_tmpfs = pytest.mark.skipif(NO_TMPFS is not None, reason=f"no tmpfs can be mounted here: {NO_TMPFS}")


@contextmanager
def disk_at(folder: Path) -> Iterator[Tmpfs]:
    """A disk of its own for one backend's files: the run's storage lies on another."""
    disk = Tmpfs(folder)
    disk.mount()
    try:
        yield disk
    finally:
        disk.unmount()


def handles(folder: Path) -> int:
    """How many files below it this process has open."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # other threads close theirs
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sum(name.startswith(str(folder)) for name in found)


def single(points: list[tuple[str, int, str]]) -> list[tuple[str, int, str]]:
    """The same as 32-bit floats, which is what TensorBoard keeps."""
    return comparable([(key, step, float(value)) for key, step, value in points], single=True)


def in_tensorboard(folder: Path) -> list[tuple[str, int, str]]:
    return comparable(tensorboard_points(folder), single=True)


@needs_tmpfs
def test_tensorboard_on_a_full_disk(track: Track, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logs = tmp_path / "runs" / "tensorboard"
    with disk_at(logs) as disk:
        run = track({"tensorboard": {"enabled": True, "flush_secs": 0.1}, "delivery": {"final_secs": SECONDS}})
        run.log(100)
        run.wait_delivered("tensorboard")
        disk.fill()
        run.log(2000)
        run.wait_for(BackendState.FAILING, backend="tensorboard")
        assert "No space left on device" in (run.cursor("tensorboard").error or "")
        files, opened = len(os.listdir(logs / run.run_id)), handles(logs)
        time.sleep(3.5)  # some more tries
        assert len(os.listdir(logs / run.run_id)) <= files + 1
        assert handles(logs) <= opened + 1
        disk.free()
        run.wait_delivered("tensorboard")
        run.log(100)
        assert run.close()["tensorboard"]["state"] == "complete"
        assert in_tensorboard(logs / run.run_id) == single(journaled(run))
    assert capsys.readouterr().err.count("backend fails") == 1


def test_tensorboard_whose_folder_can_not_be_made(track: Track, tmp_path: Path) -> None:
    """A file stands where it should be; this one stops root too."""
    logs = tmp_path / "logs"
    logs.write_text("in the way")
    run = track({"tensorboard": {"enabled": True, "log_dir": str(logs)}, "delivery": {"final_secs": SECONDS}})
    run.log(100)
    run.wait_for(BackendState.FAILING, backend="tensorboard")
    assert str(logs) in (run.cursor("tensorboard").error or "")
    logs.unlink()
    run.wait_delivered("tensorboard")
    assert run.close()["tensorboard"]["state"] == "complete"
    assert in_tensorboard(logs / run.run_id) == single(journaled(run))


def sync(run: Tracked, **options: Any) -> list[syncing.Outcome]:
    store = RunStore(Storage.open(run.folder))
    record = store.load(run.run_id)
    return syncing.sync(store, record, tracking_of(record, Cursor.load_all(run.directory), {}), **options)


def in_wandb(run: Tracked) -> list[tuple[str, int, str]]:
    return comparable(wandb_points(run.folder / "wandb", run.run_id, whole=False))


@needs_tmpfs
def test_wandb_on_a_full_disk(track: Track, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its service writes later than it says, and says nothing when it can't."""
    with disk_at(tmp_path / "runs" / "wandb") as disk:
        run = track({"wandb": {"enabled": True}, "delivery": {"final_secs": SECONDS}})
        run.log(100)
        run.wait_delivered("wandb")
        wait_until(lambda: len(in_wandb(run)) >= 2 * 98, SECONDS)
        disk.fill()
        run.log(2000)
        run.wait_for(BackendState.FAILING, backend="wandb")
        disk.free()
        run.wait_delivered("wandb")
        run.log(100)
        assert run.close()["wandb"]["state"] == "complete"
        assert in_wandb(run) == journaled(run)
    assert capsys.readouterr().err.count("backend fails") == 1


@pytest.mark.slow
@needs_tmpfs
def test_wandb_on_a_disk_that_is_full_to_the_end(track: Track, tmp_path: Path) -> None:
    with disk_at(tmp_path / "runs" / "wandb") as disk:
        run = track({"wandb": {"enabled": True}, "delivery": {"final_secs": 8}})
        run.log(100)
        run.wait_delivered("wandb")
        disk.fill()
        run.log(2000)
        began = time.monotonic()
        assert run.close()["wandb"]["state"] == "pending"
        assert time.monotonic() - began < 8 + 15
        disk.free()
        (outcome,) = sync(run)
        assert outcome.is_complete
        assert in_wandb(run) == journaled(run)
        sync(run, again=True)
        assert in_wandb(run) == journaled(run)
