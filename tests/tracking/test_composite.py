"""Tracking in plain scripts: the original design's calls, and every way a script can end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_tracking import create_tracker
from ray_tracking.errors import LeaseHeldError, MetricError, NameRefusedError, RefusedError, StorageError, UsageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.records import Kind
from ray_tracking.runs.record import RunRecord
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from ray_tracking.tracking.composite import CompositeTracker
from tests.readback import comparable, mlflow_points, tensorboard_points, wandb_points
from tests.tracking.fakes import wait_until

REPOSITORY = Path(__file__).parents[2]
OFF = {"enabled": False}


@pytest.fixture
def tracker(tmp_path: Path) -> CompositeTracker:
    made = create_tracker(OFF, storage=str(tmp_path))
    assert isinstance(made, CompositeTracker)
    return made


def points_of(storage: Path, run_id: str) -> list[tuple[str, int, float]]:
    table = JournalReader(Storage.open(storage).child(run_id)).effective()
    return list(zip(*(table[name].to_pylist() for name in ("key", "step", "value")), strict=True))


def record_of(storage: Path, run_id: str = "r1") -> RunRecord:
    return RunStore(Storage.open(storage)).load(run_id)


def script(tmp_path: Path, body: str, **environment: str) -> subprocess.Popen[bytes]:
    """A user's script with a tracker `t` that has begun the run r1 on `tmp_path`/runs."""
    start = f"""
        import os, signal, sys, time
        from ray_tracking import create_tracker
        t = create_tracker({OFF!r}, storage={str(tmp_path / "runs")!r})
        t.init_experiment("script", run_id="r1")
        """
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(start) + textwrap.dedent(body))
    return subprocess.Popen(
        [sys.executable, str(path)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("ending", "exit_status", "status", "reason"),
    [
        ("t.finalize_experiment()", 0, "completed", "finalize_experiment()"),
        ("t.finalize_experiment('failed')", 0, "failed", "finalize_experiment()"),
        ("", 0, "completed", "the script ended"),
        ("sys.exit(0)", 0, "completed", "the script ended"),
        ("raise ValueError('two\\nlines')", 1, "failed", "ValueError: two"),
        ("raise KeyboardInterrupt", 130, "aborted", "KeyboardInterrupt"),
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", -15, "aborted", "the process that tracked ended"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, "aborted", "the process that tracked ended"),
        ("os._exit(3)", 3, "aborted", "the process that tracked ended"),
        ("os.fork() or sys.exit(); os.wait(); t.finalize_experiment()", 0, "completed", "finalize_experiment()"),
    ],
)
def test_every_way_a_script_ends(tmp_path: Path, ending: str, exit_status: int, status: str, reason: str) -> None:
    body = f"for step in range(1, 101): t.log_metrics({{'loss': step / 2}}, step=step)\nassert t.flush()\n{ending}\n"
    process = script(tmp_path, body)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (exit_status, -2 if exit_status == 130 else exit_status), errors.decode()
    wait_until(lambda: record_of(tmp_path / "runs").status.is_final)
    record = record_of(tmp_path / "runs")
    assert record.status.value == status
    assert (record.attempts[-1].reason or "").startswith(reason)
    assert points_of(tmp_path / "runs", "r1") == [("loss", step, step / 2) for step in range(1, 101)]


def test_a_killed_script_leaves_a_delivered_run(tmp_path: Path) -> None:
    """SIGKILL in the middle: what was acknowledged is in the journal and in the backend, once."""
    body = """
        t.finalize_experiment()
        t = create_tracker({"tensorboard": {"enabled": True}, "delivery": {"final_secs": 120}}, storage=t._storage)
        t.init_experiment("script", run_id="r2")
        step = 0
        while True:
            step += 1
            t.log_metrics({"loss": step / 2}, step=step)
            if step % 100 == 0 and t.flush():
                print(step, flush=True)
        """
    process = script(tmp_path, body)
    assert process.stdout is not None
    acknowledged = 0
    while acknowledged < 1000:
        acknowledged = int(process.stdout.readline())
    process.kill()
    acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
    process.communicate()
    wait_until(lambda: record_of(tmp_path / "runs", "r2").status.is_final, 180)
    assert record_of(tmp_path / "runs", "r2").status.value == "aborted"
    found = points_of(tmp_path / "runs", "r2")
    assert len(found) >= acknowledged
    assert found == [("loss", step, step / 2) for step in range(1, len(found) + 1)]
    shown = tensorboard_points(tmp_path / "runs" / "tensorboard" / "r2")
    assert comparable(shown, single=True) == comparable(found, single=True)


def test_a_fork_that_outlives_the_script_does_not_keep_the_run_open(tmp_path: Path) -> None:
    process = script(
        tmp_path,
        """
        t.log_metrics({"loss": 1.0}, step=1)
        t.flush()
        child = os.fork()
        if not child:
            os.close(1); os.close(2)
            time.sleep(300); os._exit(0)
        print(child, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        wait_until(lambda: record_of(tmp_path / "runs").status.is_final, 120)
    finally:
        os.kill(child, signal.SIGKILL)
        process.communicate()


def test_the_original_usage_without_ray_and_torch(tmp_path: Path) -> None:
    """In a plain script that can import neither; three backends equal the journal, point by point."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import sys

            class Blocked:
                def find_spec(self, name, path=None, target=None):
                    if name.partition(".")[0] in ("ray", "torch"):
                        raise ImportError(f"{name} is not installed here")

            sys.meta_path.insert(0, Blocked())
            """
        )
    )
    runs = tmp_path / "runs"
    (tmp_path / "train.py").write_text(
        textwrap.dedent(
            f"""
            from ray_tracking import create_tracker, get_config

            try:
                import torch
            except ImportError:
                pass
            else:
                raise SystemExit("torch is not blocked")
            config = get_config(overrides={{
                "experiment_tracking.tensorboard.enabled": True,
                "experiment_tracking.wandb.enabled": True,
                "experiment_tracking.wandb.mode": "offline",
                "experiment_tracking.mlflow.enabled": True,
                "experiment_tracking.delivery.final_secs": 180,
            }})
            tracker = create_tracker(config["experiment_tracking"], storage={str(runs)!r})
            run_id = tracker.init_experiment("digits", config={{"lr": 0.1}}, run_id="r1", tags={{"team": "vision"}})
            for step in range(1, 301):
                tracker.log_metrics({{f"train/m{{k}}": step * 0.5 + k for k in range(10)}}, step=step)
            tracker.log_params({{"width": 8}})
            tracker.log_text("note", "hello")
            tracker.log_histogram("grad", [0.1, 0.2])
            tracker.finalize_experiment()
            """
        )
    )
    done = subprocess.run(
        [sys.executable, "train.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(blocked), str(REPOSITORY)])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    expected = [(f"train/m{k}", step, step * 0.5 + k) for step in range(1, 301) for k in range(10)]
    assert points_of(runs, "r1") == expected
    found = tensorboard_points(runs / "tensorboard" / "r1")
    assert comparable(found, single=True) == comparable(expected, single=True)
    assert comparable(wandb_points(runs / "wandb", "r1")) == comparable(expected)
    from mlflow import MlflowClient

    uri = f"sqlite:///{runs}/mlflow.db"
    client = MlflowClient(uri)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert comparable(mlflow_points(uri, run.info.run_id)) == comparable(expected)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"lr": "0.1", "width": "8"}


def test_killing_the_tracker_process_is_not_noticed(tracker: CompositeTracker, tmp_path: Path) -> None:
    run_id = tracker.init_experiment("killed")
    for step in range(1, 201):
        tracker.log_metrics({"loss": step / 2}, step=step)
        if step in (50, 150):
            assert tracker.flush()
            assert tracker._transport is not None
            os.kill(tracker._transport.pid, signal.SIGKILL)
    tracker.finalize_experiment()
    assert points_of(tmp_path, run_id) == [("loss", step, step / 2) for step in range(1, 201)]
    assert record_of(tmp_path, run_id).status.value == "completed"
    assert len(record_of(tmp_path, run_id).attempts) == 1


def test_killed_at_the_very_end(tracker: CompositeTracker, tmp_path: Path) -> None:
    run_id = tracker.init_experiment("killed")
    tracker.log_metrics({"loss": 1.0})
    assert tracker.flush()
    assert tracker._transport is not None
    os.kill(tracker._transport.pid, signal.SIGKILL)
    tracker.finalize_experiment()
    assert record_of(tmp_path, run_id).status.value == "completed"
    assert points_of(tmp_path, run_id) == [("loss", 1, 1.0)]


def test_steps_that_are_not_named(tracker: CompositeTracker, tmp_path: Path) -> None:
    """The last step plus one; a text or an image belongs to the last."""
    run_id = tracker.init_experiment("steps")
    tracker.log_text("t", "before any")
    for _ in range(2):
        tracker.log_metrics({"a": 1.0})
    tracker.log_metrics({"a": 1.0}, step=10)
    tracker.log_metrics({"a": 1.0})
    tracker.log_text("t", "at 11")
    tracker.log_metrics({"a": 1.0}, step=5)
    tracker.log_metrics({"a": 1})
    tracker.finalize_experiment()
    assert [step for _, step, _ in points_of(tmp_path, run_id)] == [1, 2, 10, 11, 5, 6]
    records = JournalReader(Storage.open(tmp_path).child(run_id)).read()
    assert [record.step for record in records if record.kind is Kind.TEXT] == [0, 11]


def test_a_run_that_goes_on_supersedes_nothing(tmp_path: Path) -> None:
    for part in range(2):
        tracker = create_tracker(OFF, storage=str(tmp_path))
        tracker.init_experiment("again", run_id="r1")
        for _ in range(3):
            tracker.log_metrics({"a": float(part)})
        if part == 0:
            tracker.log_image("late", [[0, 1]], step=50)
        tracker.finalize_experiment("failed")
    assert points_of(tmp_path, "r1") == [("a", s, 0.0) for s in (1, 2, 3)] + [("a", s, 1.0) for s in (51, 52, 53)]
    images = list(JournalReader(Storage.open(tmp_path).child("r1")).effective_records([Kind.IMAGE]))
    assert len(images) == 1


def test_two_trackers_in_one_process(tmp_path: Path) -> None:
    trackers = [create_tracker(OFF, storage=str(tmp_path)) for _ in range(2)]
    ids = [tracker.init_experiment("twin") for tracker in trackers]
    assert ids[0] != ids[1]
    for step in range(1, 51):
        for number, tracker in enumerate(trackers):
            tracker.log_metrics({"a": float(number)}, step=step)
    for tracker in trackers:
        tracker.finalize_experiment()
    for number, run_id in enumerate(ids):
        assert points_of(tmp_path, run_id) == [("a", step, float(number)) for step in range(1, 51)]


def test_calls_out_of_order(tracker: CompositeTracker) -> None:
    with pytest.raises(UsageError, match="logs no run yet"):
        tracker.log_metrics({"a": 1.0})
    with pytest.raises(UsageError, match="logs no run yet"):
        tracker.finalize_experiment()
    tracker.init_experiment("one")
    with pytest.raises(UsageError, match="already logs"):
        tracker.init_experiment("two")
    with pytest.raises(UsageError, match="No such status"):
        tracker.finalize_experiment("done")
    tracker.finalize_experiment()
    tracker.finalize_experiment()
    with pytest.raises(UsageError, match="has ended its run"):
        tracker.log_metrics({"a": 1.0})
    tracker.init_experiment("three")
    tracker.log_metrics({"a": 1.0})
    tracker.finalize_experiment()


def test_what_can_not_be_logged_raises_and_the_rest_goes_on(tracker: CompositeTracker, tmp_path: Path) -> None:
    run_id = tracker.init_experiment("bad")
    calls: list[Callable[[], None]] = [
        lambda: tracker.log_metrics({"a": None}),
        lambda: tracker.log_params([1]),  # type: ignore[arg-type]
        lambda: tracker.log_histogram("h", ["a"]),
        lambda: tracker.log_image("i", [1, 2]),
        lambda: tracker.log_artifact("no/such/file"),
        lambda: tracker.log_text("t", "x", step="first"),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(MetricError):
            call()
    tracker.log_metrics({"good": 1.0}, step=1)
    tracker.finalize_experiment()
    assert points_of(tmp_path, run_id) == [("good", 1, 1.0)]


def test_a_completed_run_is_refused_and_no_process_is_left(tmp_path: Path) -> None:
    first = create_tracker(OFF, storage=str(tmp_path))
    first.init_experiment("x", run_id="done")
    first.finalize_experiment()
    second = create_tracker(OFF, storage=str(tmp_path))
    with pytest.raises(RefusedError, match="'done' is completed"):
        second.init_experiment("x", run_id="done")
    second.init_experiment("x", run_id="other")
    second.finalize_experiment()


def test_two_scripts_on_one_run_id(tmp_path: Path, tracker: CompositeTracker) -> None:
    tracker.init_experiment("x", run_id="r1")
    tracker.log_metrics({"loss": 1.0}, step=1)
    second = create_tracker(OFF, storage=str(tmp_path))
    with pytest.raises(LeaseHeldError, match=r"'r1' is being written by another process: pid [0-9]+ on"):
        second.init_experiment("x", run_id="r1")
    second.init_experiment("x", run_id="r2")
    second.finalize_experiment()
    tracker.finalize_experiment("aborted")
    second.init_experiment("x", run_id="r1")
    second.log_metrics({"loss": 2.0}, step=2)
    second.finalize_experiment()
    assert points_of(tmp_path, "r1") == [("loss", 1, 1.0), ("loss", 2, 2.0)]
    assert [attempt.number for attempt in record_of(tmp_path).attempts] == [1, 2]


def test_an_unwritable_storage_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    tracker = create_tracker(OFF, storage=str(tmp_path / "file" / "runs"))
    began = time.monotonic()
    with pytest.raises(StorageError, match="RAY_TRACKING_STORAGE"):
        tracker.init_experiment("x")
    assert time.monotonic() - began < 3


@pytest.mark.parametrize("run_id", ["../x", "/etc", "a/b", "%2e%2e", "C:\\x", ".hidden", "tensorboard", "x.db", "é"])
def test_a_run_id_that_could_leave_the_storage_is_refused_before_any_io(tmp_path: Path, run_id: str) -> None:
    tracker = create_tracker(OFF, storage=str(tmp_path / "runs"))
    with pytest.raises(NameRefusedError):
        tracker.init_experiment("x", run_id=run_id)
    assert not (tmp_path / "runs").exists()


def test_a_broken_backend_is_named_at_the_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:  # bound, so that nobody else gets it, and not listened on
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
        config = {"mlflow": {"enabled": True, "tracking_uri": uri}, "delivery": {"final_secs": 90}}
        tracker = create_tracker(config, storage=str(tmp_path))
        run_id = tracker.init_experiment("broken")
        for step in range(1, 11):
            tracker.log_metrics({"a": 1.0}, step=step)
        assert tracker._transport is not None
        end = time.monotonic() + 120
        while tracker._transport.call("status")["backends"]["mlflow"] != "failing":
            assert time.monotonic() < end
            time.sleep(0.2)
        began = time.monotonic()
        tracker.finalize_experiment()
        assert time.monotonic() - began < 15  # it was down before: not waited for to the last second
    shown = capfd.readouterr().err
    assert "backend has not got everything; the journal has" in shown
    assert "pending=11" in shown
    assert uri in shown
    assert len(points_of(tmp_path, run_id)) == 10


def test_the_script_s_own_imports_reach_the_tracker(tmp_path: Path) -> None:
    """The package found only through sys.path, not through an installation or PYTHONPATH."""
    package = tmp_path / "elsewhere"
    shutil.copytree(REPOSITORY / "ray_tracking", package / "ray_tracking", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(REPOSITORY / "configs", package / "ray_tracking" / "config" / "defaults")
    code = (
        f"import sys; sys.path.insert(0, {str(package)!r});"
        "import ray_tracking; assert 'elsewhere' in ray_tracking.__file__, ray_tracking.__file__;"
        f"t = ray_tracking.create_tracker({OFF!r}, storage={str(tmp_path / 'runs')!r});"
        "t.init_experiment('x', run_id='r1'); t.log_metrics({'a': 1.0}); t.finalize_experiment();"
        "print(t._storage)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert points_of(tmp_path / "runs", "r1") == [("a", 1, 1.0)]
