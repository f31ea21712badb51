"""`--retries N`: when the driver is started again, and when it is not. Drivers are small scripts here;
one with Ray is in tests/runtime/test_recovery.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from ray_tracking.cli import supervising
from ray_tracking.cli.supervising import driver_command, ending_of, newest_step, supervise
from ray_tracking.runs import stopping
from ray_tracking.runs.record import RunRecord, Status
from ray_tracking.runs.store import RunStore
from ray_tracking.runtime import retrying
from ray_tracking.runtime.retrying import Ending
from tests.monitoring.builder import RunBuilder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrying, "FIRST_WAIT_SECONDS", 0.05)


def driver(folder: Path, *ends: str) -> list[str]:
    """A command whose n-th start does the n-th of `ends`; the last one from then on."""
    script = f"""
import os, signal, sys, time
path = {str(folder / "starts")!r}
with open(path, "a") as file:
    file.write("x")
ends = {ends!r}
exec(ends[min(os.path.getsize(path), len(ends)) - 1])
"""
    return [sys.executable, "-c", script]


def starts(folder: Path) -> int:
    path = folder / "starts"
    return path.stat().st_size if path.exists() else 0


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("code", "status", "ending"),
    [
        (0, "completed", Ending.COMPLETED),
        (1, "failed", Ending.FAILED),
        (1, "running", Ending.FAILED),
        (1, None, Ending.FAILED),
        (1, "aborted", Ending.STOPPED),
        (2, None, Ending.REFUSED),
        (3, "running", Ending.REFUSED),
        (130, "running", Ending.STOPPED),
        (-9, "running", Ending.LOST),
        (-9, "completed", Ending.COMPLETED),  # it died after it had recorded the end
        (3, "completed", Ending.REFUSED),
        (-9, None, Ending.LOST),
        (137, "running", Ending.LOST),
    ],
)
def test_what_an_end_means(code: int, status: str | None, ending: Ending) -> None:
    assert ending_of(code, status) is ending


@pytest.mark.parametrize(
    ("ends", "retries", "code", "count"),
    [
        (["sys.exit(0)"], 3, 0, 1),
        ([KILLED, "sys.exit(1)", "sys.exit(0)"], 3, 0, 3),
        ([KILLED], 2, 1, 3),
        (["sys.exit(1)"], 1, 1, 2),
        (["sys.exit(2)"], 3, 2, 1),
        (["sys.exit(3)"], 3, 3, 1),
        (["sys.exit(130)"], 3, 130, 1),
        ([KILLED, "sys.exit(2)"], 3, 2, 2),
    ],
)
def test_what_can_be_tried_again_is(
    store: RunStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ends: list[str],
    retries: int,
    code: int,
    count: int,
) -> None:
    monkeypatch.setattr(supervising, "_AWAY_SECONDS", 0.0)
    assert supervise(driver(tmp_path, *ends), store, "r", retries) == code
    assert starts(tmp_path) == count


def test_a_cluster_that_was_there_is_waited_for(
    store: RunStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its head died with the driver: until it is back, the driver is refused, which uses up none of the budget."""
    ends = [KILLED, *["sys.exit(2)"] * 3, "sys.exit(0)"]
    assert supervise(driver(tmp_path, *ends), store, "r", 1) == 0
    assert starts(tmp_path) == 5
    assert "it may only be for now" in capsys.readouterr().err


def test_progress_fills_the_budget_again(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: Iterable[int] = iter([-1, 8, 8, 16, 16, 16])
    monkeypatch.setattr(supervising, "newest_step", lambda *_: next(steps))  # type: ignore[call-overload]
    assert supervise(driver(tmp_path, KILLED), store, "r", 2) == 1
    assert starts(tmp_path) == 5, "8, 8, 16, 16, 16: three in a row without progress after the last"
    said = capsys.readouterr().err
    assert said.count("the driver was killed by SIGKILL; it is started again") == 4
    assert "--retries 2 allows no further try" in said


def test_the_newest_checkpoint_is_seen(store: RunStore) -> None:
    assert newest_step(store, "r") == -1
    builder = RunBuilder(store, "r")
    builder.checkpoint(2, {"val/loss": 0.5})
    builder.checkpoint(4, {"val/loss": 0.5})
    assert newest_step(store, "r") == 4


def test_a_run_that_was_stopped_is_not_started_again(store: RunStore, tmp_path: Path) -> None:
    store.save(RunRecord("r", "r", time.time(), status=Status.ABORTED))
    assert supervise(driver(tmp_path, "sys.exit(1)"), store, "r", 5) == 1
    assert starts(tmp_path) == 1


def test_a_stop_while_it_waits_to_start_again(
    store: RunStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.save(RunRecord("r", "r", time.time()))
    stopping.request(store.directory("r"))
    assert supervise(driver(tmp_path, KILLED), store, "r", 5) == 1
    assert starts(tmp_path) == 1
    assert "asked to stop" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_driver_once_and_ends_the_retries(store: RunStore, tmp_path: Path, number: int) -> None:
    waits = """
seen = []
for each in (signal.SIGINT, signal.SIGTERM):
    signal.signal(each, lambda n, f: seen.append(n))
open(path + ".ready", "w")
while not seen:
    time.sleep(0.02)
time.sleep(0.2)
sys.exit(100 + len(seen))
"""
    command = driver(tmp_path, waits)

    def interrupt() -> None:
        while not (tmp_path / "starts.ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    before = signal.getsignal(number)
    assert supervise(command, store, "r", 5) == 101
    thread.join()
    assert starts(tmp_path) == 1
    assert signal.getsignal(number) is before


def test_the_command_of_a_driver_is_one_that_the_program_takes(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text("def train(run):\n    pass\n")
    options = [("-c", None), ("--set", ["params.a=1", "params.b=x y"]), ("--run-id", "../x"), ("--debug", False)]
    command = driver_command("train", "job.py:train", options=options)
    assert command[3:] == [
        *("train", "job.py:train", "--set", "params.a=1", "--set", "params.b=x y", "--run-id", "../x"),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "'../x'" in done.stderr
