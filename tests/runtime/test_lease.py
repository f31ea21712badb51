"""One driver per run: of two that start at once one runs; one that was stopped for too long is fenced afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ray_tracking import TrainingManager, get_config
from ray_tracking.checkpoint import CheckpointInfo, CheckpointStore
from ray_tracking.checkpoint.manifest import Manifest, save_attempt
from ray_tracking.errors import LeaseHeldError, LeaseLostError, UsageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.records import Kind
from ray_tracking.runs.lease import acquire
from ray_tracking.runs.lease_rules import Seat
from ray_tracking.runs.record import RunRecord, Status
from ray_tracking.runs.store import RunStore
from ray_tracking.runtime.ownership import own
from ray_tracking.storage import Storage
from ray_tracking.testing.chaos.plan import Part
from ray_tracking.testing.chaos.processes import descendants, snapshot
from ray_tracking.tracking.cursor import Cursor
from tests import readback
from tests.runtime import lease_functions

REPOSITORY = Path(__file__).parents[2]
FUNCTION = f"{Path(__file__).with_name('lease_functions.py')}:slowly"
PATIENCE = 240.0
"""For machines that many tests share."""


def wait_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"it did not happen in time: {what}"
        time.sleep(0.05)


class Driver:
    """A command of ours in a process of its own, with what it starts."""

    def __init__(self, storage: Path, *words: str) -> None:
        self.errors = storage / f"errors-{time.monotonic_ns()}"
        environment = {**os.environ, "RAY_TRACKING_STORAGE": str(storage / "runs"), "PYTHONPATH": str(REPOSITORY)}
        with self.errors.open("w") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ray_tracking", *words],
                cwd=storage,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=stream,
            )

    def end(self) -> int:
        return self.process.wait(PATIENCE)

    def said(self) -> str:
        return self.errors.read_text()

    def tracker(self) -> int:
        (found,) = [p for p in descendants([self.process.pid], snapshot()) if p.is_part(Part.TRACKER)]
        return found.pid

    def kill(self) -> None:
        """With all that it has started."""
        for each in [*descendants([self.process.pid], snapshot()), self.process]:
            try:
                os.kill(each.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait(30)


def train(storage: Path, epochs: int, seconds: float, **settings: Any) -> Driver:
    given = {"params.epochs": epochs, "params.seconds": seconds, "training.default.save_steps": 5, **settings}
    words = [word for key, value in given.items() for word in ("--set", f"{key}={value}")]
    return Driver(storage, "train", FUNCTION, "--env", "testing", "--run-id", "r", *words)


def rows(storage: Path) -> list[Any]:
    return JournalReader(Storage.open(storage / "runs").child("r"), strict=False).read(0, 10**6)


def reached(storage: Path, attempt: int) -> int:
    return max((row.step for row in rows(storage) if row.kind is Kind.SCALAR and row.attempt == attempt), default=0)


@pytest.mark.ray
@pytest.mark.slow
def test_of_two_drivers_that_start_at_once_one_runs_and_the_other_is_told_which(tmp_path: Path) -> None:
    drivers = [train(tmp_path, 2, 0.1) for _ in range(2)]
    try:
        wait_until(lambda: any(driver.process.poll() is not None for driver in drivers), "one is refused")
        winner, loser = sorted(drivers, key=lambda driver: driver.process.poll() is not None)
        assert winner.process.poll() is None, "the other one trains"
        assert loser.process.returncode == 3, loser.said()
        assert f"'r' is being written by another process: pid {winner.process.pid} on" in loser.said()
        assert "Traceback" not in loser.said()
        assert reached(tmp_path, 1) < 2 * lease_functions.STEPS, "it was told long before the end"
        assert winner.end() == 0, winner.said()
    finally:
        for driver in drivers:
            driver.kill()
    record = RunStore(Storage.open(tmp_path / "runs")).load("r")
    assert (record.status, len(record.attempts)) == (Status.COMPLETED, 1)
    steps = [row.step for row in rows(tmp_path) if row.key == "train/loss"]
    assert steps == list(range(1, 2 * lease_functions.STEPS + 1))


@pytest.mark.ray
@pytest.mark.slow
def test_a_driver_and_its_tracker_stopped_for_longer_than_the_lease(tmp_path: Path) -> None:
    """Its workers train on meanwhile; another driver takes over; the first goes on: nothing of it counts any more."""
    backends = {f"experiment_tracking.{name}.enabled": "true" for name in ("tensorboard", "wandb", "mlflow")}
    patient = {"experiment_tracking.delivery.final_secs": 60, "failure.lease_secs": 3}
    total = 4 * lease_functions.STEPS
    first = train(tmp_path, 4, 0.25, **backends, **patient)
    second: Driver | None = None
    stopped: list[int] = []
    try:
        wait_until(lambda: reached(tmp_path, 1) >= 22 or first.process.poll() is not None, "the first trains")
        assert first.process.poll() is None, first.said()
        stopped += [first.tracker(), first.process.pid]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        before = reached(tmp_path, 1)
        time.sleep(4.0)
        second = Driver(tmp_path, "resume", "r")
        wait_until(lambda: reached(tmp_path, 2) > 0 or (second and second.process.poll() is not None), "it takes over")
        assert second.process.poll() is None, second.said()
        resumed = RunStore(Storage.open(tmp_path / "runs")).load("r").attempts[1].resumed_from_step
        assert resumed is not None
        assert 20 <= resumed <= 30
        while stopped:
            os.kill(stopped.pop(), signal.SIGCONT)
        assert first.end() == 3, first.said()
        assert f"but by pid {second.process.pid} on" in first.said()
        assert second.process.poll() is None, "the second is not disturbed"
        assert second.end() == 0, second.said()
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        for driver in (first, second):
            if driver is not None:
                driver.kill()
    runs = RunStore(Storage.open(tmp_path / "runs"))
    record, run = runs.load("r"), runs.directory("r")
    assert record.status is Status.COMPLETED
    assert [attempt.number for attempt in record.attempts] == [1, 2]

    history = [row for row in JournalReader(run).effective().to_pylist() if row["key"] == "by"]
    by = {row["step"]: row["value"] for row in history}
    assert [row["step"] for row in history] == list(range(1, total + 1))
    assert {step for step, attempt in by.items() if attempt == 1.0} == set(range(1, resumed + 1))

    infos = CheckpointStore(run).checkpoints()
    assert infos[-1].step == total
    assert all(info.step <= resumed for info in infos if save_attempt(info) == 1)
    assert {save_attempt(info) for info in infos if info.step > resumed} == {2}

    cursors = {cursor.backend: cursor for cursor in Cursor.load_all(run)}
    shown = {
        "tensorboard": readback.tensorboard_points(cursors["tensorboard"].location or ""),
        "wandb": readback.wandb_points(cursors["wandb"].location or "", cursors["wandb"].run_id or ""),
        "mlflow": readback.mlflow_points(cursors["mlflow"].location or "", cursors["mlflow"].run_id or ""),
    }
    for name, points in shown.items():
        assert sorted(step for key, step, _ in points if key == "train/loss") == list(range(1, total + 1)), name
    for name, points in shown.items():
        # MLflow and W&B can't take back what they had been shown by then.
        open_to = range(0) if name == "tensorboard" else range(resumed + 1, before + 1)
        told = {step: value for key, step, value in points if key == "by" and step not in open_to}
        assert told == {step: value for step, value in by.items() if step not in open_to}, name


# --- without Ray


def test_a_run_that_is_owned_is_refused_before_ray_is_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_tracking.runtime.cluster.connect", lambda *_: pytest.fail("Ray was reached"))
    lease = acquire(Storage.open(tmp_path).child("r"))
    began = time.monotonic()
    with pytest.raises(LeaseHeldError, match=f"pid {os.getpid()} on"):
        TrainingManager(get_config("testing", {"storage": str(tmp_path)}), run_id="r").fit(lease_functions.slowly)
    assert time.monotonic() - began < 2.0
    lease.check()


def test_a_run_that_could_not_begin_leaves_no_trace_unless_its_id_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any) -> bool:
        raise UsageError("no cluster there")

    monkeypatch.setattr("ray_tracking.runtime.cluster.connect", unreachable)
    config = get_config("testing", {"storage": str(tmp_path)})
    for run_id in (None, "given"):
        with pytest.raises(UsageError, match="no cluster"):
            TrainingManager(config, run_id=run_id).fit(lease_functions.slowly)
    assert [path.name for path in tmp_path.iterdir()] == ["given"]
    assert acquire(Storage.open(tmp_path).child("given")).epoch == 2, "given back"


def test_force_new_takes_another_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_tracking.runtime.cluster.connect", lambda *_: pytest.fail("far enough", pytrace=False))
    runs = RunStore(Storage.open(tmp_path))
    for run_id in ("r", "r-2"):
        runs.save(RunRecord(run_id, "n", 1.0).finish(2.0, Status.COMPLETED, "completed"))
    before = (tmp_path / "r" / "run.json").read_bytes()
    manager = TrainingManager(get_config("testing", {"storage": str(tmp_path)}), run_id="r", force_new=True)
    with pytest.raises(pytest.fail.Exception, match="far enough"):
        manager.fit(lease_functions.slowly)
    assert manager.run_id == "r-3"
    assert (tmp_path / "r" / "run.json").read_bytes() == before


def test_training_is_aborted_when_the_run_is_lost(tmp_path: Path) -> None:
    run, aborted = Storage.open(tmp_path).child("r"), threading.Event()
    with own(run, 1.0) as owner, owner.aborting(aborted.set):
        owner.check()
        run.write_bytes(Seat(2).name, run.read_bytes(Seat(1).name))  # another owner
        assert aborted.wait(60)
        with pytest.raises(LeaseLostError):
            owner.check()
        with pytest.raises(LeaseLostError), owner.aborting(aborted.set):
            pytest.fail("it must not begin")
    assert run.exists(Seat(2).name)


def test_which_attempt_saved_a_checkpoint() -> None:
    """The folder tells the first attempt of its driver alone."""
    info = CheckpointInfo(5, "attempt-001/step-000005", attempt=1)
    assert save_attempt(info) == 1
    manifest = Manifest(5, 0, 0, 1, 0, 0.0, {}, (), {}, save_id="attempt-3")
    assert save_attempt(CheckpointInfo(5, info.folder, attempt=1, manifests=(manifest,))) == 3
