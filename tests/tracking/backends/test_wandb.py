"""W&B's offline files, read by W&B's own inspector."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ray_tracking.errors import BackendRefusedError
from ray_tracking.records import Artifact, Histogram, Kind
from ray_tracking.tracking.backends.base import RunInfo
from ray_tracking.tracking.backends.wandb import WandbBackend
from ray_tracking.tracking.backends.wandb_rows import held_offset, run_files
from tests.readback import comparable, wandb_files, wandb_points, wandb_records, wandb_rows
from tests.tracking.backends.records import grid, png, record, scalars
from tests.tracking.fakes import wait_until


def test_one_row_per_step_under_one_wandb_folder(run_info: RunInfo) -> None:
    backend = WandbBackend(project="p", tags=["a"], mode="offline")
    identity = backend.open(run_info, None)
    assert (identity.run_id, identity.location) == ("r1", f"{run_info.local_dir}/wandb")
    points = grid(range(1, 31), keys=10)
    for i in range(0, 300, 7):  # batches that split steps
        backend.write(scalars(points[i : i + 7], offset=i))
    backend.close("completed")
    rows = wandb_rows(identity.location, "r1")
    assert [row["_step"] for row in rows] == list(range(1, 31))
    assert [row["_timestamp"] for row in rows] == [1_700_000_000.0 + step for step in range(1, 31)]
    assert comparable(wandb_points(identity.location, "r1")) == comparable(points)
    assert not list(Path(run_info.local_dir).glob("wandb/wandb"))


def test_late_steps_and_repeated_keys_are_kept(run_info: RunInfo) -> None:
    points = [
        ("a", 10, 1.0), ("b", 10, 2.0), ("a", 10, 3.0), ("a", 10, 4.0), ("a", 4, 5.0), ("b", 3, 6.0),
        ("c.d", 2, 7.0), ("c.d", 1, 8.0), ("a", 11, 9.0), ("a", 12, 10.0), ("a", 40, 11.0), ("b", 0, 12.0),
    ]  # fmt: skip
    backend = WandbBackend()
    folder = backend.open(run_info, None).location
    for i, point in enumerate(points):
        backend.write(scalars([point], offset=i))
    backend.close("completed")
    assert comparable(wandb_points(folder, "r1")) == comparable(points)


def test_reopened_by_a_later_process(run_info: RunInfo) -> None:
    first = WandbBackend()
    identity = first.open(run_info, None)
    first.write(scalars(grid(range(1, 11))))
    first.close("interrupted")
    second = WandbBackend()
    assert second.open(run_info, identity) == identity
    assert second.position() == 29
    second.write(scalars(grid(range(1, 16))))  # all of it again, and more
    second.close("completed")
    assert len(wandb_files(identity.location, "r1")) == 2
    assert comparable(wandb_points(identity.location, "r1")) == comparable(grid(range(1, 16)))


_KILLED = """
import os, sys, time
from ray_tracking.tracking.backends.base import RunInfo
from ray_tracking.tracking.backends.wandb import WandbBackend
from ray_tracking.tracking.backends.wandb_rows import held_offset
from tests.tracking.backends.records import grid, scalars
backend = WandbBackend()
folder = backend.open(RunInfo("r1", "killed", local_dir=sys.argv[1]), None).location
backend.write(scalars(grid(range(1, 2001))))
end = time.monotonic() + float(sys.argv[2])
while time.monotonic() < end and held_offset(folder, "r1") < 5990:
    time.sleep(0.1)
os.kill(os.getpid(), 9)
"""


def is_served(pid: int) -> bool:
    """Whether a W&B service that the process `pid` has started still runs."""
    asked = b"\0--pid\0%d\0" % pid
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if asked in path.read_bytes():
                return True
    return False


@pytest.mark.parametrize("wait", [0.0, 60.0])
def test_a_killed_process_loses_nothing(run_info: RunInfo, wait: float) -> None:
    """The client may lose what it took; `position` says from where on, and what is sent again stands there once."""
    process = subprocess.Popen([sys.executable, "-c", _KILLED, run_info.local_dir, str(wait)])
    process.wait(180)
    wait_until(lambda: not is_served(process.pid))  # it may still write
    time.sleep(1.1)
    backend = WandbBackend()
    folder = backend.open(run_info, None).location
    position = backend.position()
    assert position is not None
    assert position < 6000
    if wait:
        assert position >= 5990
    backend.write(scalars(grid(range(1, 2006))))
    backend.close("completed")
    assert comparable(wandb_points(folder, "r1", whole=False)) == comparable(grid(range(1, 2006)))


def test_the_service_process_is_killed(run_info: RunInfo) -> None:
    """In a process of its own: other tests here share this one's service."""
    script = _SERVICE_KILLED.format(folder=run_info.local_dir)
    done = subprocess.run([sys.executable, "-c", script], timeout=180, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert comparable(wandb_points(f"{run_info.local_dir}/wandb", "r1", whole=False)) == comparable(grid(range(1, 301)))


_SERVICE_KILLED = """
import os, signal, subprocess, time
from ray_tracking.errors import BackendError
from ray_tracking.tracking.backends.base import RunInfo
from ray_tracking.tracking.backends.wandb import WandbBackend
from tests.tracking.backends.records import grid, scalars
backend, run = WandbBackend(), RunInfo("r1", "killed", local_dir={folder!r})
identity = backend.open(run, None)
backend.write(scalars(grid(range(1, 201))))
assert backend.open(run, identity) == identity and backend.position() == 599
children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True)
(service,) = [int(line.split()[0]) for line in children.stdout.splitlines() if "wandb-core" in line]
os.kill(service, signal.SIGKILL)
os.waitid(os.P_PID, service, os.WEXITED | os.WNOWAIT)
time.sleep(1.1)
try:
    backend.write(scalars(grid(range(201, 301)), offset=600))
except BackendError:
    assert backend.open(run, identity) == identity
    assert backend.position() < 599
else:
    raise SystemExit("the write to a dead service succeeded")
backend.write(scalars(grid(range(1, 301))))
backend.close("completed")
"""


def test_files_of_a_run_that_was_opened_twice_within_a_second_are_all_its_own(tmp_path: Path) -> None:
    """W&B numbers the second folder, which then looks like that of a run called `r1-1`."""
    folders = ["offline-run-20260101_000001-r1", "offline-run-20260101_000001-r1-1", "offline-run-20260101_000002-r1"]
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "run-r1.wandb").touch()
    other = tmp_path / "offline-run-20260101_000001-r1-2"
    other.mkdir()
    (other / "run-r1-2.wandb").touch()
    assert run_files(str(tmp_path), "r1") == [str(tmp_path / folder / "run-r1.wandb") for folder in folders]
    assert run_files(str(tmp_path), "r1-2") == [str(other / "run-r1-2.wandb")]
    assert run_files(str(tmp_path), "r") == []


def test_held_offset_needs_only_the_files_end(run_info: RunInfo) -> None:
    backend = WandbBackend()
    folder = backend.open(run_info, None).location
    assert held_offset(folder, "r1") == -1
    assert held_offset(folder, "other") is None
    note = record(Kind.TEXT, "note", b"x" * 60_000)  # over several of the file's blocks
    for step in range(40):
        backend.write([note._replace(step=step, offset=step)])
    backend.close("completed")
    assert held_offset(folder, "r1") == 39


def test_media_params_tags_and_artifacts(run_info: RunInfo) -> None:
    Path(run_info.artifacts, "plots").mkdir()
    Path(run_info.artifacts, "plots/a.txt").write_text("kept")
    backend = WandbBackend(tags=["mine"])
    folder = backend.open(run_info, None).location
    backend.write(
        [
            record(Kind.PARAM, "lr", b"0.1"),
            record(Kind.PARAM, "lr", b"0.2"),
            record(Kind.TAG, "stage", b"dev " + b"x" * 100),
            record(Kind.TEXT, "note", "häppy 🎉".encode()),
            record(Kind.IMAGE, "digits", png(7, 3)),
            record(Kind.IMAGE, "broken", png()[:40]),
            record(Kind.HISTOGRAM, "grad", Histogram((0.0, 1.0, 2.0), (3, 5), 1.0, 2.0).encode()),
            record(Kind.ARTIFACT, "plot", Artifact("plots/a.txt", 4, "").encode()),
            record(Kind.ARTIFACT, "gone", Artifact("plots/b.txt", 4, "").encode()),
        ]
    )
    backend.close("completed")
    (row,) = wandb_rows(folder, "r1")
    assert row["note"] == "häppy 🎉"
    assert (row["grad.bins"], row["grad.values"]) == ([0, 1, 2], [3, 5])
    assert (row["digits.width"], row["digits.height"]) == (7, 3)
    assert row["broken"] == "[not a PNG image]"
    files = Path(wandb_files(folder, "r1")[0]).parent / "files"
    assert (files / "artifacts/plots/a.txt").read_text() == "kept"
    assert (files / row["digits.path"]).is_file()
    config: dict[str, object] = {}
    for entry in wandb_records(folder, "r1"):
        config |= entry.get("run", {}).get("config", {}).get("update", {})
        config |= entry.get("config", {}).get("update", {})
    assert config["lr"] == 0.2
    assert config["width"] == 8
    assert config["tags"] == {"team": "vision", "stage": "dev " + "x" * 100}
    tags = json.dumps([entry["run"].get("tags") for entry in wandb_records(folder, "r1") if entry["type"] == "run"])
    assert '"mine"' in tags
    assert '"team:vision"' in tags
    assert '"stage:dev ' in tags


def test_online_without_a_login_is_refused_at_once(run_info: RunInfo) -> None:
    began = time.monotonic()
    with pytest.raises(BackendRefusedError, match=r"(?s)no login.*wandb login.*mode: offline"):
        WandbBackend(mode="online").open(run_info, None)
    assert time.monotonic() - began < 5  # W&B itself would wait for thirty


def test_runs_in_threads_do_not_mix(local_dir: Path) -> None:
    def one(number: int) -> None:
        backend = WandbBackend()
        backend.open(RunInfo(f"run{number}", "", local_dir=str(local_dir)), None)
        backend.write(scalars([("n", step, float(number)) for step in range(50)]))
        backend.close("completed")

    threads = [threading.Thread(target=one, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(180)
    for number in range(3):
        points = wandb_points(local_dir / "wandb", f"run{number}")
        assert points == [("n", step, float(number)) for step in range(50)]


def test_an_id_that_wandb_refuses_gets_a_digest(local_dir: Path) -> None:
    backend = WandbBackend()
    identity = backend.open(RunInfo("a b+" + "x" * 100, "", local_dir=str(local_dir)), None)
    backend.write(scalars([("n", 1, 1.0)]))
    backend.close("completed")
    assert identity.run_id.startswith("a_b_xxx")
    assert len(identity.run_id) == 64
    assert wandb_points(identity.location, identity.run_id) == [("n", 1, 1.0)]
