"""Backends filled after the run has ended: what they lack, once, whatever else fails."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from ray_tracking.config import ExperimentTrackingConfig
from ray_tracking.errors import BackendError, BackendRefusedError, RefusedError
from ray_tracking.journal import JournalWriter
from ray_tracking.runs.lease import acquire
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from ray_tracking.tracking import syncing
from ray_tracking.tracking.cursor import BackendState, Cursor
from ray_tracking.tracking.factory import UnavailableBackend
from ray_tracking.tracking.syncing import Outcome, sync_command
from tests.monitoring.builder import RunBuilder, scalars
from tests.tracking.fakes import FakeBackend, PositionedBackend, shown

pytestmark = pytest.mark.usefixtures("quick")

ROWS = 21  # the attempt's own, and twenty points


@pytest.fixture
def run(tmp_path: Path) -> RunBuilder:
    """Completed, its journal compacted."""
    run = RunBuilder(RunStore(Storage.open(tmp_path / "runs")), "r1", created=1000.0).log(scalars(range(1, 21)))
    JournalWriter(run.directory, 2).compact()
    assert [name for name, _ in run.directory.walk("journal") if not name.endswith(".parquet")] == []
    return run.finish(at=2000.0)


def fill(run: RunBuilder, *backends: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Outcome]:
    monkeypatch.setattr(syncing, "create_backends", lambda _: list(backends))
    tracking = ExperimentTrackingConfig.model_validate({"delivery": {"deadline_secs": 0.6}})
    outcomes = syncing.sync(run.store, run.record, tracking, **options)
    return {one.backend: one for one in outcomes}


def test_all_of_it_also_into_one_that_the_run_never_had(run: RunBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend()
    done: list[tuple[int, int]] = []
    (one,) = fill(run, backend, monkeypatch=monkeypatch, progress=lambda *now: done.append(now)).values()
    assert one == Outcome("memory", BackendState.COMPLETE, ROWS, 0, None, "memory")
    assert shown(backend) == [("val/loss", step, 1.0 / step) for step in range(1, 21)]
    assert backend.status == "completed"
    assert done[-1] == (ROWS, ROWS)
    assert Cursor.load(run.directory, "memory").state is BackendState.COMPLETE


def test_again_it_does_nothing(run: RunBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(run, FakeBackend(), monkeypatch=monkeypatch)
    untouched, looked_at, anew = FakeBackend(), FakeBackend(), FakeBackend()
    (one,) = fill(run, untouched, monkeypatch=monkeypatch).values()
    assert (one.state, one.delivered, untouched.calls) == (BackendState.COMPLETE, 0, [])
    (one,) = fill(run, looked_at, monkeypatch=monkeypatch, touched=["memory"]).values()
    assert (one.delivered, looked_at.calls) == (0, ["open", "close"])
    (one,) = fill(run, anew, monkeypatch=monkeypatch, again=True).values()
    assert (one.delivered, len(shown(anew))) == (ROWS, 20)


def test_only_what_the_cursor_lacks(run: RunBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"run_id": "r1", "location": "memory"}
    run.backend("memory", offset=11, delivered=11, state=BackendState.PENDING, error="was down", **known)
    backend = FakeBackend()
    (one,) = fill(run, backend, monkeypatch=monkeypatch).values()
    assert [record.offset for record in backend.records] == [*range(11, ROWS)]
    assert (one.delivered, one.pending, one.error) == (10, 0, None)


def test_only_what_the_backend_itself_lacks(run: RunBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client had taken more than it kept, as the cursor can't know."""
    run.backend("memory", offset=ROWS, delivered=ROWS, state=BackendState.PENDING, run_id="r1", location="memory")
    backend = PositionedBackend(held=15)
    (one,) = fill(run, backend, monkeypatch=monkeypatch).values()
    assert [record.offset for record in backend.records] == [*range(16, ROWS)]
    assert one.is_complete


def test_another_server_gets_everything(run: RunBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.backend("memory", offset=ROWS, delivered=ROWS, state=BackendState.COMPLETE, run_id="r1", location="elsewhere")
    backend = FakeBackend()
    (one,) = fill(run, backend, monkeypatch=monkeypatch, touched=["memory"]).values()
    assert (len(shown(backend)), one.location, one.is_complete) == (20, "memory", True)


def test_a_broken_one_is_given_up_and_the_others_complete(run: RunBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    hanging = FakeBackend("hangs")
    hanging.gate.clear()
    broken = FakeBackend("down", broken=BackendError("nothing listens"))
    began = time.monotonic()
    found = fill(
        run,
        FakeBackend("good"),
        broken,
        FakeBackend("login", broken=BackendRefusedError("401")),
        FakeBackend("odd", broken=SystemExit(3)),
        FakeBackend("unclosed", broken_close=OSError("lost")),
        FakeBackend("busy", broken=BackendError("429", retry_after=3600.0)),
        UnavailableBackend("gone", "The package gone is not installed.", 'pip install "ray-tracking[gone]"'),
        hanging,
        monkeypatch=monkeypatch,
    )
    assert time.monotonic() - began < 20
    states = {name: (one.state.value, one.pending, one.error) for name, one in found.items()}
    assert states.pop("hangs")[:2] == ("pending", ROWS)
    assert states == {
        "good": ("complete", 0, None),
        "down": ("pending", ROWS, "nothing listens"),
        "login": ("disabled", ROWS, "401"),
        "odd": ("pending", ROWS, "SystemExit: 3"),
        "unclosed": ("pending", 0, "OSError: lost"),
        "busy": ("pending", ROWS, "429"),
        "gone": ("unavailable", ROWS, 'The package gone is not installed. pip install "ray-tracking[gone]"'),
    }
    assert broken.calls == ["open"] * 4
    hanging.gate.set()
    fill(run, FakeBackend("down"), monkeypatch=monkeypatch)
    assert Cursor.load(run.directory, "down").state is BackendState.COMPLETE


def test_one_that_fails_now_and_then_gets_everything_once(run: RunBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend(failures=[BackendError("busy")] * 3, max_records=5)
    (one,) = fill(run, backend, monkeypatch=monkeypatch).values()
    assert one.is_complete
    assert len(shown(backend)) == 20


def test_one_that_is_being_written_is_refused(run: RunBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend()
    with pytest.raises(RefusedError, match="shows signs of life") as raised:
        fill(run, backend, monkeypatch=monkeypatch, looks_alive=True)
    assert "ray-tracking status r1 --storage" in str(raised.value)
    lease = acquire(run.directory)
    with pytest.raises(RefusedError, match="is being written by pid"):
        fill(run, backend, monkeypatch=monkeypatch)
    assert backend.calls == []
    lease.release()
    # Now the lease tells, and not how lately the run showed signs of life.
    assert fill(run, backend, monkeypatch=monkeypatch, looks_alive=True)["memory"].is_complete
    acquire(run.directory).release()  # and it was given back


def test_one_whose_process_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunBuilder(RunStore(Storage.open(tmp_path)), "r2").log(scalars(range(1, 21)))
    backend = FakeBackend()
    assert fill(run, backend, monkeypatch=monkeypatch)["memory"].is_complete
    assert (len(shown(backend)), backend.status) == (20, "interrupted")
    assert run.store.load("r2").status is Status.RUNNING  # its record is left to those who go on with it


def test_one_that_was_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunBuilder(RunStore(Storage.open(tmp_path)), "r3").log(scalars(range(1, 21))).resume(10)
    run.log(scalars(range(11, 16), attempt=2)).finish()
    for rewinds in (True, False):
        backend = FakeBackend(f"rewinds-{rewinds}".lower(), rewinds=rewinds)
        fill(run, backend, monkeypatch=monkeypatch)
        assert [step for _, step, _ in shown(backend)] == [*range(1, 16)]  # not what the resume superseded


def test_an_interruption_leaves_it_pending(run: RunBuilder, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend(seconds=0.02, max_records=1)

    def interrupt(done: int, wanted: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(run, backend, monkeypatch=monkeypatch, progress=interrupt)
    saved = Cursor.load(run.directory, "memory")
    assert saved.state in (BackendState.PENDING, BackendState.COMPLETE)  # complete if it was done in the last second
    acquire(run.directory).release()


def test_the_command() -> None:
    assert sync_command("r1", str(Path("runs").absolute())) == "ray-tracking sync r1"
    assert sync_command("a run", "s3://b/my runs?x=1") == "ray-tracking sync 'a run' --storage 's3://b/my runs?x=1'"
