"""One tracker per run: a second one is refused, and one that another has taken over from writes nothing any more."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ray_tracking.errors import LeaseHeldError, LeaseLostError, StorageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.records import Kind
from ray_tracking.runs.lease import LeaseKeeper, acquire
from ray_tracking.runs.lease_rules import FOLDER
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore
from ray_tracking.storage import Storage
from ray_tracking.tracking import service as service_module
from ray_tracking.tracking.cursor import Cursor
from ray_tracking.tracking.service import TrackerService
from ray_tracking.tracking.spec import TrackerSpec
from ray_tracking.tracking.transport import pack
from tests.s3 import s3_server, s3_uri
from tests.tracking.fakes import FakeBackend, wait_until

__all__ = ["s3_server", "s3_uri"]

pytestmark = pytest.mark.usefixtures("quick")

SECONDS = 2.0
"""The lease of one that is taken over from: the other has to wait for it to run out."""


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> list[FakeBackend]:
    """One for each service, in the order in which they start."""
    made: list[FakeBackend] = []

    def create(tracking: Any) -> list[FakeBackend]:
        made.append(FakeBackend())
        return made[-1:]

    monkeypatch.setattr(service_module, "create_backends", create)
    return made


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Any]:
    services: list[TrackerService] = []

    def start(lease: str | None = None, seconds: float = 30.0) -> TrackerService:
        spec = TrackerSpec("run-1", "run", str(tmp_path), str(tmp_path), lease=lease, lease_secs=seconds)
        services.append(TrackerService(spec))
        return services[-1]

    yield start
    for service in services:
        service._closing.set()
        for delivery in service._deliveries:
            delivery.finish("interrupted", 0.0)
        service._hold.release()


def batch(*steps: int) -> bytes:
    return pack([(step, "scalar", step, 1000.0 + step, {"loss": step / 2}) for step in steps])


def run_of(tmp_path: Path) -> Storage:
    return Storage.open(tmp_path).child("run-1")


def steps_of(tmp_path: Path) -> list[tuple[int, int]]:
    """(attempt, step) of every scalar."""
    rows = JournalReader(run_of(tmp_path)).read(0, 10**6)
    return [(row.attempt, row.step) for row in rows if row.kind is Kind.SCALAR]


def take_over(tmp_path: Path, start: Any, stale: TrackerService) -> TrackerService:
    """As if `stale` had been stopped for longer than its lease: it has not renewed it, nor looked at it."""
    stale._hold._keeper._over.set()
    stale._hold._keeper._thread.join()
    clock = stale._hold._lease._clock
    stopped = clock.now()
    clock.now = lambda: stopped  # type: ignore[method-assign]
    stale._hold._lease.renew()  # so that it is sure for as long as it is stopped: its threads go on here
    for file in Path(run_of(tmp_path).path(FOLDER)).iterdir():
        os.utime(file, (time.time() - 60,) * 2)
    later = start()
    clock.now = lambda: stopped + SECONDS  # type: ignore[method-assign]
    return later


def test_a_second_tracker_is_refused_and_told_who_writes_the_run(start: Any, tmp_path: Path) -> None:
    first = start()
    first.begin_attempt(1)
    with pytest.raises(LeaseHeldError, match=rf"pid {os.getpid()} on .*, since .* UTC") as refused:
        start()
    assert (refused.value.run, refused.value.epoch, refused.value.exit_code) == ("run-1", 1, 3)
    assert refused.value.process is not None
    assert refused.value.process.pid == os.getpid()
    first.close("aborted", "done")
    assert start().begin_attempt(1) == 2, "given back at the end"


def test_a_run_that_is_completed_is_not_held_by_who_was_refused(start: Any, tmp_path: Path) -> None:
    start().close("completed", "done")
    for _ in range(2):
        with pytest.raises(Exception, match="is completed"):
            start()


def test_the_driver_owns_the_run_and_its_trackers_write_it(start: Any, tmp_path: Path) -> None:
    driver = acquire(run_of(tmp_path))
    with LeaseKeeper(driver):
        first = start(driver.ticket)
        first.append(0, first.begin_attempt(1), batch(1, 2))
        first._hold._keeper.__exit__()  # it has died
        second = start(driver.ticket)
        with pytest.raises(LeaseLostError, match="given back"):
            first.append(0, 1, batch(1, 2, 3))
        assert second.append(0, 1, batch(1, 2, 3)) == 3
        assert second._hold.term == (1, 2)
        second.close("aborted", "done")
    with pytest.raises(LeaseLostError):
        start(driver.ticket)
    assert steps_of(tmp_path) == [(1, 1), (1, 2), (1, 3)]


def test_one_that_was_taken_over_from_writes_nothing_more(
    start: Any, tmp_path: Path, backends: list[FakeBackend]
) -> None:
    first = start(seconds=SECONDS)
    assert first.begin_attempt(1) == 1
    first.append(0, 1, batch(1, 2, 3))
    assert first.wait_delivered(60)
    second = take_over(tmp_path, start, first)
    # Its cursor may be on its way to storage, begun in time.
    wait_until(lambda: not first._deliveries[0]._thread.is_alive())
    assert second.begin_attempt(1) == 2
    second.append(0, 2, pack([(1, "attempt", 2, 1.0, {"attempt": b""})]))
    second.append(0, 2, pack([(2, "scalar", 3, 1003.0, {"loss": 1.5}), (3, "scalar", 4, 1004.0, {"loss": 2.0})]))
    before = {name: run_of(tmp_path).read_bytes(name) for name, _ in run_of(tmp_path).walk() if "lease" not in name}
    record = RunStore(Storage.open(tmp_path)).load("run-1")

    for act in (
        lambda: first.append(0, 1, batch(1, 2, 3, 4, 5)),
        lambda: first.begin_attempt(1),
        lambda: first.end_attempt("it failed"),
        lambda: first.confirm(),
        lambda: first.hopeless(),
        lambda: first.report_progress({"step": 5}),
        lambda: first.close("completed", "done"),
        lambda: first._save_summary(),
        lambda: first._writer.merge() or first._writer.compact(),
    ):
        with pytest.raises(LeaseLostError) as lost:
            act()
        assert lost.value.epoch == 2
        assert lost.value.run == "run-1"
    first._deliveries[0]._save()
    now = {name: run_of(tmp_path).read_bytes(name) for name in before}
    mine = {name for name in now if now[name] != before[name]}
    assert mine <= {"summary.json", "cursors/memory.json"}, "those of the second, which goes on"
    assert json.loads(now["cursors/memory.json"])["offset"] >= json.loads(before["cursors/memory.json"])["offset"]

    second.append(0, 2, pack([(4, "scalar", 5, 1005.0, {"loss": 2.5})]))
    report = second.close("completed", "done")
    assert report["backends"]["memory"]["state"] == "complete"
    assert steps_of(tmp_path) == [(1, 1), (1, 2), (1, 3), (2, 3), (2, 4), (2, 5)]
    history = JournalReader(run_of(tmp_path)).effective()
    assert history["step"].to_pylist() == [1, 2, 3, 4, 5]
    finished = RunStore(Storage.open(tmp_path)).load("run-1")
    assert finished.status is Status.COMPLETED
    assert [attempt.number for attempt in finished.attempts] == [1, 2]
    assert [attempt.number for attempt in record.attempts] == [1, 2]
    assert [row.step for row in backends[0].records] == [1, 2, 3]
    assert "close" not in backends[0].calls, "the run goes on there"
    assert [cursor.state for cursor in Cursor.load_all(run_of(tmp_path))] == ["complete"]


def test_a_record_that_was_written_late_is_written_over(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_SUMMARY_SECONDS", 0.05)
    first = start(seconds=SECONDS)
    first.begin_attempt(1)
    second = take_over(tmp_path, start, first)
    second.begin_attempt(1)
    stale = first._records.record.finish(time.time(), Status.FAILED, "cut off")
    RunStore(Storage.open(tmp_path)).save(stale)  # it had been begun in time
    runs = RunStore(Storage.open(tmp_path))
    wait_until(lambda: runs.load("run-1").status is Status.RUNNING and len(runs.load("run-1").attempts) == 2)


def test_the_record_is_not_read_again_and_again_where_nobody_was_before(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start()
    first.begin_attempt(1)
    RunStore(Storage.open(tmp_path)).save(replace(first._records.record, status=Status.FAILED))
    first._records.repair()
    assert RunStore(Storage.open(tmp_path)).load("run-1").status is Status.FAILED


def test_a_storage_that_is_away_for_longer_than_the_lease_is_only_a_delay(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has taken over meanwhile: what was refused is sent again and kept."""
    first = start(seconds=SECONDS)
    first.begin_attempt(1)
    first.append(0, 1, batch(1))
    away = [True]
    real = Storage.write_bytes

    def write_bytes(self: Storage, name: str, data: Any) -> None:
        if away:
            raise StorageError(f"Can't write {name}: away")
        real(self, name, data)

    monkeypatch.setattr(Storage, "write_bytes", write_bytes)
    now = first._hold._lease._clock.now
    first._hold._lease._clock.now = lambda: now() + 5 * SECONDS  # type: ignore[method-assign]
    with pytest.raises(StorageError):
        first.append(0, 1, batch(1, 2))
    away.clear()
    assert first.append(0, 1, batch(1, 2, 3)) == 3
    assert steps_of(tmp_path) == [(1, 1), (1, 2), (1, 3)]


def test_on_s3(s3_uri: str, tmp_path: Path) -> None:
    """The storage's own conditions and clock decide there; segments carry the writer's lease in their names."""
    run = Storage.open(s3_uri).child("run-1")
    spec = TrackerSpec("run-1", "run", s3_uri, str(tmp_path), tracking={"enabled": False})
    driver = acquire(run, duration=300.0)  # nobody renews it
    first = TrackerService(replace(spec, lease=driver.ticket))
    first.append(0, first.begin_attempt(1), batch(1, 2))
    with pytest.raises(LeaseHeldError, match=f"pid {os.getpid()} on"):
        TrackerService(spec)
    assert all("-000001.0001.arrow" in name for name, _ in run.walk("journal"))
    first._hold.release()  # it has died
    second = TrackerService(replace(spec, lease=driver.ticket))
    assert second.append(0, 1, batch(1, 2, 3)) == 3
    with pytest.raises(LeaseLostError):
        first.append(0, 1, batch(4))
    second.close("completed", "done")
    driver.release()
    rows = JournalReader(run).read()
    assert [row.step for row in rows if row.kind is Kind.SCALAR] == [1, 2, 3]
    first._closing.set()
