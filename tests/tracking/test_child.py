"""The tracker process of a plain script: killed, hanging, orphaned."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ray_tracking.errors import LeaseHeldError, LeaseLostError, RefusedError, StorageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.records import Kind
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from ray_tracking.tracking import child as child_module
from ray_tracking.tracking.child import ChildTransport
from ray_tracking.tracking.cursor import Cursor
from ray_tracking.tracking.sender import Sender
from ray_tracking.tracking.spec import TrackerSpec
from ray_tracking.tracking.transport import TransportError, pack
from tests.readback import mlflow_points, tensorboard_points
from tests.tracking.fakes import Clock, wait_until
from tests.tracking.stale_script import RUN, Tracked


def spec(tmp_path: Path, run_id: str = "run-1") -> TrackerSpec:
    return TrackerSpec(run_id, "run", str(tmp_path), str(tmp_path), tracking={"enabled": False})


def steps_of(tmp_path: Path, run_id: str = "run-1") -> list[int]:
    records = JournalReader(Storage.open(tmp_path).child(run_id)).read(0, 10**6)
    return [record.step for record in records if record.kind is Kind.SCALAR]


def batch(*steps: int) -> bytes:
    return pack([(step, "scalar", step, 1.0, {"loss": 0.5}) for step in steps])


def next_in_flight(transport: ChildTransport) -> threading.Event:
    """Set once the next request has been sent and its answer is waited for."""
    sent = threading.Event()
    receive = transport._pipe.receive

    def wait(*arguments: Any) -> Any:
        sent.set()
        return receive(*arguments)

    transport._pipe.receive = wait  # type: ignore[method-assign]
    return sent


def pipes() -> set[str]:
    """Those that this process has open."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own, and what other threads close
            found.add(os.readlink(f"/proc/self/fd/{descriptor}"))
    return {name for name in found if name.startswith("pipe:")}


def test_killed_over_and_over_nothing_is_lost_or_doubled(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    transport = ChildTransport(spec(tmp_path))
    sender = Sender(transport, rank=0, attempt=transport.call("begin_attempt", 1), interval=0.005)
    log_metrics = sender.metrics_logger(Clock())
    pids = {transport.pid}
    step = 0
    for pause in (0.0, 0.02, 0.1):
        until = step + 300
        while step < until:
            step += 1
            log_metrics({"loss": step / 2}, step)
            if step % 20 == 0:
                time.sleep(0.002)
        time.sleep(pause)
        os.kill(transport.pid, signal.SIGKILL)
        for _ in range(50):
            step += 1
            log_metrics({"loss": step / 2}, step)
        assert sender.flush(60)
        pids.add(transport.pid)
        assert steps_of(tmp_path) == list(range(1, step + 1))
    assert len(pids) == 4
    assert sender.close() == 0
    assert transport.call("close", "completed", "done")["next_offset"] == step
    transport.close()
    assert steps_of(tmp_path) == list(range(1, step + 1))
    assert "the tracker process died; starting it again" in capfd.readouterr().err


def test_killed_while_a_request_is_in_flight(tmp_path: Path) -> None:
    transport = ChildTransport(spec(tmp_path))
    attempt = transport.call("begin_attempt", 1)
    os.kill(transport.pid, signal.SIGSTOP)
    sent = next_in_flight(transport)
    failed: list[Exception] = []

    def send() -> None:
        try:
            transport.append(0, attempt, batch(1, 2))
        except TransportError as error:
            failed.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    assert sent.wait(60)
    os.kill(transport.pid, signal.SIGKILL)
    thread.join(60)
    assert [str(error) for error in failed] == ["the tracker process ended"]
    assert transport.append(0, attempt, batch(1, 2, 3)) == 3
    transport.close()
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_call_has_a_deadline_and_its_late_answer_confuses_nobody(tmp_path: Path) -> None:
    transport = ChildTransport(spec(tmp_path))
    os.kill(transport.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(TransportError, match="did not answer within"):
        transport.call("has_history", timeout=0.2)
    assert time.monotonic() - began < 3
    os.kill(transport.pid, signal.SIGCONT)
    assert transport.call("begin_attempt", 1) == 1  # not has_history's False
    assert transport.call("begin_attempt", 1) == 2
    transport.close()


def test_close_is_bounded_while_the_process_hangs_in_a_request(tmp_path: Path) -> None:
    transport = ChildTransport(spec(tmp_path))
    attempt = transport.call("begin_attempt", 1)
    os.kill(transport.pid, signal.SIGSTOP)
    sent = next_in_flight(transport)
    failed: list[TransportError] = []

    def send() -> None:
        try:
            transport.append(0, attempt, batch(1))
        except TransportError as error:
            failed.append(error)

    thread = threading.Thread(target=send)
    thread.start()
    assert sent.wait(60)
    began = time.monotonic()
    with pytest.raises(TransportError, match="busy"):
        transport.call("close", "completed", "done", timeout=0.2)
    transport.close(0.3)
    assert time.monotonic() - began < 5  # by itself it waits for ten
    thread.join(60)
    assert len(failed) == 1
    with pytest.raises(TransportError, match="closed"):
        transport.call("last_step")


def test_signals_to_the_group_do_not_end_it(tmp_path: Path) -> None:
    transport = ChildTransport(spec(tmp_path))
    pid = transport.pid
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, number)
    assert transport.append(0, transport.call("begin_attempt", 1), batch(1)) == 1
    assert transport.pid == pid
    transport.close()


def test_what_the_service_raises_arrives_as_it_is(tmp_path: Path) -> None:
    transport = ChildTransport(spec(tmp_path))
    transport.call("begin_attempt", 1)
    with pytest.raises(TransportError, match="AttributeError"):
        transport.call("no_such_method")
    transport.call("close", "completed", "done")
    transport.close()
    with pytest.raises(RefusedError, match="is completed"):
        ChildTransport(spec(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Can't"):
        ChildTransport(TrackerSpec("r", "r", str(tmp_path / "file"), str(tmp_path), tracking={"enabled": False}))


def test_one_that_does_not_start_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module.sys, "executable", "/bin/false")
    with pytest.raises(TransportError, match="did not start"):
        ChildTransport(spec(tmp_path))


def test_its_end_without_close_aborts_the_run(tmp_path: Path) -> None:
    transport = ChildTransport(spec(tmp_path))
    transport.append(0, transport.call("begin_attempt", 1), batch(1, 2))
    transport.close()
    record = RunStore(Storage.open(tmp_path)).load("run-1")
    assert record.status is Status.ABORTED
    assert record.attempts[-1].reason is not None
    assert "without finalize_experiment" in record.attempts[-1].reason


def test_more_open_files_than_select_can_take(tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip(f"this machine allows {hard} open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    files = [open(os.devnull) for _ in range(1100)]  # noqa: SIM115
    try:
        transport = ChildTransport(spec(tmp_path))
        assert transport.call("last_step") == 0
        transport.close()
    finally:
        for file in files:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_processes_are_reaped_and_pipes_closed(tmp_path: Path) -> None:
    before = pipes()  # other threads of the tests, Ray's say, open and close files
    transport = ChildTransport(spec(tmp_path))
    for _ in range(2):
        os.kill(transport.pid, signal.SIGKILL)
        wait_until(lambda: transport._process.poll() is not None)
        assert transport.call("last_step") == 0
    transport.close()
    assert pipes() <= before


def test_a_second_one_is_refused_by_name_while_the_first_lives_and_after_it_was_killed(tmp_path: Path) -> None:
    transport = ChildTransport(spec(tmp_path))
    transport.append(0, transport.call("begin_attempt", 1), batch(1))
    with pytest.raises(LeaseHeldError, match=f"pid {transport.pid} on") as refused:
        ChildTransport(spec(tmp_path))
    assert refused.value.process is not None
    assert (refused.value.process.pid, refused.value.run, refused.value.epoch) == (transport.pid, "run-1", 1)
    os.kill(transport.pid, signal.SIGKILL)
    wait_until(lambda: transport._process.poll() is not None)
    other = ChildTransport(spec(tmp_path))  # known to be dead: not waited for
    with pytest.raises(LeaseHeldError, match=f"pid {other.pid} on"):
        transport._start(transport._spec)
    other.call("close", "aborted", "done")
    other.close()
    assert transport.append(0, 1, batch(1, 2)) == 2, "started again, once the other one has ended"
    transport.close()
    assert steps_of(tmp_path) == [1, 2]


def test_stopped_for_longer_than_its_lease_it_writes_nothing_when_it_goes_on(tmp_path: Path) -> None:
    """Two real scripts with their tracker processes: the first is stopped, the second takes over, the first goes on."""
    command = [sys.executable, "-m", "tests.tracking.stale_script", str(tmp_path), "1.5"]
    first = subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert first.stdin is not None
    assert first.stdout is not None
    stopped: list[int] = []
    try:
        said, child = first.stdout.readline().split()
        assert said == "ready"
        stopped += [int(child), first.pid]
        os.kill(int(child), signal.SIGSTOP)
        first.stdin.write("\n")  # ten steps more, sent to a tracker that is stopped: it has them before it knows
        time.sleep(1.0)
        os.kill(first.pid, signal.SIGSTOP)
        second = taken_over(tmp_path)
        second.log(range(11, 26), 500.0)
        assert second.deliver()
        while stopped:
            os.kill(stopped.pop(), signal.SIGCONT)
        output, _ = first.communicate(timeout=180)
        assert output.splitlines() == [f"LeaseLostError 2 {second.transport.pid}"] * 2 + ["unsent 10"]
        second.log(range(26, 31), 500.0)
        assert second.deliver()
        report = second.transport.call("close", "completed", "done")
        second.transport.close()
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        first.kill()
        first.communicate()
    assert {name: backend["state"] for name, backend in report["backends"].items()} == {
        "tensorboard": "complete",
        "mlflow": "complete",
    }
    run = Storage.open(tmp_path).child(RUN)
    record = RunStore(Storage.open(tmp_path)).load(RUN)
    assert (record.status, [attempt.number for attempt in record.attempts]) == (Status.COMPLETED, [1, 2])
    expected = [(step, float(step)) for step in range(1, 11)] + [(step, 500.0 + step) for step in range(11, 31)]
    history = JournalReader(run).effective()
    losses = [row for row in history.to_pylist() if row["key"] == "loss"]
    assert [(row["step"], row["value"]) for row in losses] == expected
    cursors = {cursor.backend: cursor for cursor in Cursor.load_all(run)}
    shown = {
        "tensorboard": tensorboard_points(cursors["tensorboard"].location or ""),
        "mlflow": mlflow_points(cursors["mlflow"].location or "", cursors["mlflow"].run_id or ""),
    }
    for name, points in shown.items():
        for key in ("loss", "speed"):
            steps = sorted(step for shown_key, step, _ in points if shown_key == key)
            assert steps == list(range(1, 31)), name
        assert all(value < 1000 for _, _, value in points), "nothing of what the first logged after it was stopped"


def taken_over(tmp_path: Path) -> Tracked:
    """The lease is held until it has run out; then the second script goes on from a checkpoint of step 10."""
    end = time.monotonic() + 120
    while True:
        try:
            return Tracked(str(tmp_path), 1.5, 10)
        except LeaseHeldError:
            assert time.monotonic() < end
            time.sleep(0.2)


def test_a_lost_lease_keeps_its_type_over_the_pipe(tmp_path: Path) -> None:
    error = LeaseLostError("gone", run="run-1", epoch=7, hint="end it")
    kind, values = child_module._plain(error)
    again = child_module._error_of(kind, values)
    assert isinstance(again, LeaseLostError)
    assert (str(again), again.run, again.epoch, again.process) == ("gone\nend it", "run-1", 7, None)
