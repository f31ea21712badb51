"""Runs on Ray that heal by themselves, and those that end as they were asked to: stopped, hung, crashing, preempted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray

from ray_tracking import TrainingManager, get_config
from ray_tracking.checkpoint import CheckpointStore
from ray_tracking.errors import RunFailedError, RunStoppedError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.runs.record import RunRecord
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from tests.runtime import faulty

pytestmark = pytest.mark.ray
STEPS = 24
TARGET = f"{Path(__file__).with_name('faulty.py')}:train"


def config(folder: Path, faults: list[Any], params: dict[str, Any] | None = None, **overrides: Any) -> Any:
    given = {"epochs": 2, "faults": faults, "notes": str(folder), "run_id": "r", **(params or {})}
    settings = {"storage": str(folder), "name": "r", "params": given, "scaling.workers": 2}
    return get_config("testing", {**settings, "training.default.save_steps": 4, **overrides})


def manager(folder: Path, faults: list[Any], params: dict[str, Any] | None = None, **overrides: Any) -> TrainingManager:
    return TrainingManager(config(folder, faults, params, **overrides), run_id="r")


def record(folder: Path) -> RunRecord:
    return RunStore(Storage.open(folder)).load("r")


def saved(folder: Path) -> list[tuple[int, str]]:
    infos = CheckpointStore(Storage.open(folder / "r")).checkpoints()
    return [(info.step, info.reason) for info in infos]


def logged(folder: Path) -> list[int]:
    history = JournalReader(Storage.open(folder / "r")).effective()
    return sorted(history["step"].to_pylist())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """The folder of a run of four epochs that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert manager(folder, [], {"epochs": 4}).fit(faulty.train).status == "completed"
    return folder


def wait_until_said(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    """On stderr, where Ray forwards what its processes print by and by."""
    said, end = "", time.monotonic() + 60
    while text not in (said := said + capfd.readouterr().err):
        assert time.monotonic() < end, said
        time.sleep(0.1)


def assert_like(undisturbed: Path, folder: Path, epochs: int = 2) -> None:
    """The same weights, bit for bit, and every step logged once."""
    assert logged(folder) == list(range(1, epochs * 12 + 1))
    last = f"weights-{epochs - 1}"
    assert (folder / last).read_text() == (undisturbed / last).read_text()


@pytest.mark.parametrize("asks", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_asked_to_stop_it_saves_and_goes_on_when_resumed(tmp_path: Path, undisturbed: Path, asks: bool) -> None:
    """A function that asks and returns, and one that never does."""
    rules = {"training.default.save_at_end": False}
    params = {"epochs": 4, "pause": 0.3, "asks": asks}
    with pytest.raises(RunStoppedError, match="ray-tracking resume r") as stopped:
        manager(tmp_path, [["stop", 1, 0, 6]], params, **rules).fit(faulty.train)
    assert stopped.value.exit_code == 1
    first = record(tmp_path)
    assert (first.status, first.attempts[0].reason) == ("aborted", "stopped by request")
    step, reason = saved(tmp_path)[-1]
    assert 6 < step < 26
    assert reason == "stop requested" or step % 4 == 0
    result = TrainingManager.resume("r", str(tmp_path), train=faulty.train)
    assert (result.status, result.attempts) == ("completed", 2)
    assert record(tmp_path).attempts[1].resumed_from_step == step
    assert_like(undisturbed, tmp_path, epochs=4)


def test_a_rank_that_hangs_is_named_and_the_run_goes_on(
    tmp_path: Path, undisturbed: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In Python, where its stack is shown; then stopped as a whole, where another rank has to speak for it."""
    faults = [["sleep", 1, 1, 6], ["stand still", 2, 0, 15]]
    rules = {"failure.hang_timeout_secs": 6, "failure.max_failures": 2}
    result = manager(tmp_path, faults, {"pause": 0.1}, **rules).fit(faulty.train)
    assert (result.status, result.attempts) == ("completed", 3)
    first, second, _ = (attempt.reason or "" for attempt in record(tmp_path).attempts)
    assert first.startswith("rank 1 (pid ")
    assert "hung at step 6: no progress for" in first
    assert second.startswith("rank 0 (pid ")
    assert "hung: it answers no more" in second
    wait_until_said("in sleep_for_ever", capfd)  # the stack of the rank that hangs
    assert_like(undisturbed, tmp_path)


@pytest.mark.slow
def test_crashes_with_progress_are_forgiven_and_a_loop_is_ended(tmp_path: Path, ray_cluster: None) -> None:
    faults = [["die", 1, 1, 6], ["die", 2, 0, 11], ["die", None, 1, 14]]
    with pytest.raises(RunFailedError, match="2 times in a row without a new checkpoint since that of step 12"):
        manager(tmp_path, faults, **{"failure.max_failures": 1}).fit(faulty.train)
    attempts = record(tmp_path).attempts
    assert [attempt.resumed_from_step for attempt in attempts] == [-1, 4, 8, 12]
    assert record(tmp_path).status == "failed"


@pytest.mark.slow
def test_a_preemption_is_saved_for_twice_and_costs_no_try(tmp_path: Path, undisturbed: Path) -> None:
    """At the notice and shortly before the deadline; then Ray starts the workers again, at max_failures: 0."""
    faults = [["preempted", 1, None, 3]]
    rules = {"failure.max_failures": 0, "training.default.save_steps": None}
    params = {"pause": 0.8, "notice": 11.0}
    result = manager(tmp_path, faults, params, **rules).fit(faulty.train)
    assert (result.status, result.attempts) == ("completed", 2)
    first, second = record(tmp_path).attempts
    assert first.reason == "preempted: node f00dcafe with rank 0 is taken away"
    notices = [step for step, reason in saved(tmp_path) if reason == "preemption"]
    assert len(notices) == 2
    assert second.resumed_from_step == notices[1]
    assert_like(undisturbed, tmp_path)


@pytest.mark.slow
def test_workers_that_find_no_room_end_the_run_after_a_while(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "2")

    @ray.remote(num_cpus=3)
    class Squatter:
        def here(self) -> bool:
            return True

    squatter = Squatter.remote()
    assert ray.get(squatter.here.remote())
    try:
        with pytest.raises(RunFailedError, match=r"2 workers need 1 CPU each; free: 1 of 4 CPU"):
            manager(tmp_path, [], **{"failure.start_timeout_secs": 5}).fit(faulty.train)
    finally:
        ray.kill(squatter)
    wait_until_said("the workers have not started for", capfd)


# --- the driver as a process of its own ---------------------------------------------------------------------------


def command(folder: Path, faults: list[Any], *more: str, pause: float = 0.3) -> list[str]:
    params = {"epochs": 2, "faults": faults, "notes": str(folder), "run_id": "r", "pause": pause}
    settings = [*(f"params.{name}={json.dumps(value)}" for name, value in params.items()), "scaling.workers=2"]
    settings += ["training.default.save_steps=4"]
    return [
        *(sys.executable, "-m", "ray_tracking", "train", TARGET, "--env", "testing", "--run-id", "r"),
        *("--storage", str(folder)),
        *(part for setting in settings for part in ("--set", setting)),
        *more,
    ]


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 180
    while not any(done >= step for done, _ in (saved(folder) if (folder / "r").exists() else [])):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "training did not get there"
        time.sleep(0.1)


def start(folder: Path, *arguments: Any, **options: Any) -> subprocess.Popen[str]:
    """On the cluster of the tests, which is in token mode."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_AUTH_MODE": "token"}
    address = "--address", ray.get_runtime_context().gcs_address
    return subprocess.Popen(
        command(folder, *arguments, *address, **options), cwd=folder, env=environment, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_a_sigterm_saves_a_last_checkpoint(tmp_path: Path, undisturbed: Path) -> None:
    process = start(tmp_path, [])
    try:
        wait_for_step(tmp_path, 4, process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "ray-tracking resume r" in errors
    assert (record(tmp_path).status, record(tmp_path).attempts[0].reason) == ("aborted", "interrupted")
    step, reason = saved(tmp_path)[-1]
    assert reason == "stop requested" or step % 4 == 0
    assert logged(tmp_path) == list(range(1, step + 1))
    result = TrainingManager.resume("r", str(tmp_path), train=faulty.train)
    assert (result.status, record(tmp_path).attempts[1].resumed_from_step) == ("completed", step)
    assert_like(undisturbed, tmp_path)


def test_a_driver_that_is_killed_is_started_again(tmp_path: Path, undisturbed: Path) -> None:
    # It sleeps soon after: the run can't be over before its driver is killed.
    more = "--retries", "2", "--set", "failure.lease_secs=10"  # what the next one waits for
    process = start(tmp_path, [["sleep", 1, 0, 10]], *more)
    try:
        wait_for_step(tmp_path, 8, process)
        (driver,) = children(process.pid)
        os.kill(driver, signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "the driver was killed by SIGKILL; it is started again" in errors
    assert record(tmp_path).status == "completed"
    first, second = record(tmp_path).attempts
    assert first.reason == "interrupted"
    assert (second.resumed_from_step or 0) >= 8
    assert_like(undisturbed, tmp_path)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- on clusters of their own ---------------------------------------------------------------------------------------


def on_a_private_cluster(name: str, folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.private_cluster", name, str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.mark.slow
def test_a_node_that_is_drained_is_saved_for_and_costs_no_try(tmp_path: Path) -> None:
    on_a_private_cluster("drained", tmp_path)
    first, second = record(tmp_path).attempts
    assert (first.reason or "").startswith("preempted: node ")
    notices = [step for step, reason in saved(tmp_path) if reason == "preemption"]
    assert notices
    assert (second.resumed_from_step or 0) >= notices[-1]
    assert logged(tmp_path) == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_worker_that_rays_memory_monitor_ends_is_named_and_tried_again(tmp_path: Path) -> None:
    on_a_private_cluster("memory", tmp_path)
    reason = record(tmp_path).attempts[0].reason or ""
    assert "out of memory: Ray ended the worker before the node ran out of it (" in reason
    assert "GB used on " in reason
