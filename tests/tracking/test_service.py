"""The tracker of a run: what it acknowledged is there once, whatever was resent, refused or restarted."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_tracking.errors import RefusedError, StorageError
from ray_tracking.journal.reader import JournalReader
from ray_tracking.records import Kind, Record
from ray_tracking.runs import stopping
from ray_tracking.runs.process import Process
from ray_tracking.runs.record import Status
from ray_tracking.runs.store import RunStore
from ray_tracking.runs.summary import Summary
from ray_tracking.storage import Storage
from ray_tracking.tracking import service as service_module
from ray_tracking.tracking.cursor import BackendState, Cursor
from ray_tracking.tracking.hangs import Report
from ray_tracking.tracking.service import TrackerService
from ray_tracking.tracking.spec import TrackerSpec
from ray_tracking.tracking.transport import pack
from tests.readback import tensorboard_points
from tests.tracking.fakes import FakeBackend, shown, wait_until

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def closing() -> Iterator[list[TrackerService]]:
    """Services whose threads are ended after the test."""
    services: list[TrackerService] = []
    yield services
    for service in services:
        service._closing.set()
        for delivery in service._deliveries:
            delivery.finish("interrupted", 0.0)
        service._hold.release()


@pytest.fixture
def start(tmp_path: Path, closing: list[TrackerService]) -> Any:
    def start(tracking: dict[str, Any] | None = None, run_id: str = "run-1") -> TrackerService:
        for earlier in closing:
            if earlier.spec.run_id == run_id:
                earlier._hold.release()  # one that was killed is known to be dead; in this process it is not
        spec = TrackerSpec(run_id, "run", str(tmp_path), str(tmp_path), tracking=tracking or {"enabled": False})
        closing.append(TrackerService(spec))
        return closing[-1]

    return start


def events(steps: range, key: str = "loss", seq: int | None = None) -> bytes:
    first = steps.start if seq is None else seq
    return pack([(first + i, "scalar", step, 1000.0 + step, {key: step / 2}) for i, step in enumerate(steps)])


def journal_of(tmp_path: Path, run_id: str = "run-1") -> list[Record]:
    return JournalReader(Storage.open(tmp_path).child(run_id)).read(0, 10**6)


def points(records: list[Record]) -> list[tuple[int, str, int]]:
    return [(record.rank, record.key, record.step) for record in records if record.kind is Kind.SCALAR]


def test_a_resent_batch_is_dropped_also_after_a_restart(start: Any, tmp_path: Path) -> None:
    service = start()
    attempt = service.begin_attempt(1)
    assert service.append(0, attempt, events(range(1, 11))) == 10
    assert service.append(0, attempt, events(range(1, 11))) == 10
    assert service.append(0, attempt, events(range(6, 16))) == 15
    again = start()  # the first was killed: it never closed
    assert again.append(0, attempt, events(range(11, 21))) == 20
    assert points(journal_of(tmp_path)) == [(0, "loss", step) for step in range(1, 21)]


def test_ranks_and_attempts_have_their_own_numbers(start: Any, tmp_path: Path) -> None:
    service = start()
    first = service.begin_attempt(2)
    service.append(0, first, events(range(1, 4)))
    service.append(1, first, events(range(1, 4)))
    second = service.begin_attempt(2)
    assert (first, second) == (1, 2)
    assert service.append(0, second, events(range(1, 4))) == 3
    assert len(points(journal_of(tmp_path))) == 9


def test_many_senders_at_once(start: Any, tmp_path: Path) -> None:
    service = start()
    attempt = service.begin_attempt(8)
    acknowledged: dict[int, int] = {}

    def send(rank: int) -> None:
        for begin in range(1, 101, 10):
            for _ in range(1 + begin % 3):
                acknowledged[rank] = service.append(rank, attempt, events(range(begin, begin + 10)))

    threads = [threading.Thread(target=send, args=(rank,)) for rank in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert acknowledged == dict.fromkeys(range(8), 100)
    found = points(journal_of(tmp_path))
    assert len(found) == 800
    for rank in range(8):
        assert [point for point in found if point[0] == rank] == [(rank, "loss", step) for step in range(1, 101)]


@pytest.mark.parametrize("lands", [False, True])
def test_a_failing_storage_doubles_nothing_for_any_sender(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lands: bool
) -> None:
    """Two senders share a commit that fails; the first to resend also brings in the other's records."""
    service = start()
    attempt = service.begin_attempt(2)
    real, failures = Storage.write_bytes, [1]

    def write_bytes(self: Storage, name: str, data: Any) -> None:
        if failures and name.startswith("journal/"):
            failures.pop()
            if lands:
                real(self, name, data)
            raise StorageError("no space left on device")
        real(self, name, data)

    monkeypatch.setattr(Storage, "write_bytes", write_bytes)
    errors: list[StorageError] = []

    def send(rank: int) -> None:
        try:
            service.append(rank, attempt, events(range(1, 6)))
        except StorageError as error:
            errors.append(error)

    threads = [threading.Thread(target=send, args=(rank,)) for rank in range(2)]
    with service._intake._committing:  # both wait, so that they are committed together
        for thread in threads:
            thread.start()
        wait_until(lambda: len(service._intake._waiting) == 2)
    for thread in threads:
        thread.join()
    assert len(errors) == 2
    assert service.append(0, attempt, events(range(1, 6))) == 5
    assert service.append(1, attempt, events(range(1, 8))) == 7
    found = points(journal_of(tmp_path))
    assert sorted(found) == [(0, "loss", s) for s in range(1, 6)] + [(1, "loss", s) for s in range(1, 8)]


def test_what_the_journal_can_not_hold_is_dropped_and_holds_up_nobody(
    start: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service = start()
    attempt = service.begin_attempt(2)
    bad = pack([(1, "scalar", 2**70, 1.0, {"x": 1.0})])
    answers: dict[int, int] = {}
    threads = [
        threading.Thread(target=lambda r=rank, b=batch: answers.update({r: service.append(r, attempt, b)}))
        for rank, batch in ((0, bad), (1, events(range(1, 4))))
    ]
    with service._intake._committing:
        for thread in threads:
            thread.start()
        wait_until(lambda: len(service._intake._waiting) == 2)
    for thread in threads:
        thread.join()
    assert answers == {0: 1, 1: 3}
    assert service.append(0, attempt, events(range(2, 4))) == 3
    assert sorted(points(journal_of(tmp_path))) == [
        (0, "loss", 2), (0, "loss", 3), (1, "loss", 1), (1, "loss", 2), (1, "loss", 3),
    ]  # fmt: skip
    assert service.close("completed", "done")["refused"] == 1
    assert "records dropped" in capsys.readouterr().err


def test_odd_keys_and_values_are_journaled(start: Any, tmp_path: Path) -> None:
    service = start()
    attempt = service.begin_attempt(1)
    payload = {1: 2**70, "\ud800": 10**400, "": True, "nul\0": float("nan"), ("t", 1): -(10**400)}
    service.append(0, attempt, pack([(1, "scalar", 1, 1.0, payload)]))
    found = {record.key: repr(record.value) for record in journal_of(tmp_path)}
    assert found == {"1": repr(2.0**70), "?": "inf", "": "1.0", "nul\0": "nan", "('t', 1)": "-inf"}


def test_real_tensorboard_and_an_mlflow_where_nothing_listens(start: Any, tmp_path: Path) -> None:
    with socket.socket() as unused:  # bound, so that nobody else gets it, and not listened on
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        service = start(
            {
                "tensorboard": {"enabled": True},
                "wandb": {"enabled": False},
                "mlflow": {"enabled": True, "tracking_uri": f"http://127.0.0.1:{port}"},
                "delivery": {"final_secs": 6},
            }
        )
        attempt = service.begin_attempt(1)
        for begin in range(1, 301, 50):
            service.append(0, attempt, events(range(begin, begin + 50)))
        began = time.monotonic()
        report = service.close("completed", "done")
        assert time.monotonic() - began < 9
    assert report["backends"]["tensorboard"]["state"] == "complete"
    mlflow = Cursor.load(Storage.open(tmp_path).child("run-1"), "mlflow")
    assert (mlflow.state, mlflow.offset) == (BackendState.PENDING, 0)
    assert mlflow.error is not None
    assert str(port) in mlflow.error
    assert report["backends"]["mlflow"]["pending"] == 300
    assert points(journal_of(tmp_path)) == [(0, "loss", step) for step in range(1, 301)]
    found = tensorboard_points(tmp_path / "tensorboard" / "run-1")
    assert sorted(found) == [("loss", step, step / 2) for step in range(1, 301)]
    record = RunStore(Storage.open(tmp_path)).load("run-1")
    assert (record.status, record.attempts[-1].reason) == (Status.COMPLETED, "done")


def test_who_waits_for_delivery_waits_no_pause_out(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend("shows")
    monkeypatch.setattr(service_module, "create_backends", lambda _: [backend])
    monkeypatch.setattr("ray_tracking.tracking.delivery._PAUSE_SECONDS", 60.0)
    service = start({"enabled": True})
    attempt = service.begin_attempt(1)
    for begin in (1, 11, 21):  # the first call comes at once, what comes after it waits for the next
        service.append(0, attempt, events(range(begin, begin + 10)))
        assert service.wait_delivered(30)
        assert len(shown(backend)) == begin + 9
    service.append(0, attempt, events(range(31, 41)))
    assert service.close("completed", "done")["backends"]["shows"]["state"] == "complete"
    assert len(shown(backend)) == 40


def test_close_twice_and_by_several(start: Any, tmp_path: Path) -> None:
    service = start()
    service.append(0, service.begin_attempt(1), events(range(1, 4)))
    reports: list[Any] = []
    threads = [threading.Thread(target=lambda: reports.append(service.close("completed", "done"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reports.append(service.close("failed", "later"))
    assert len(reports) == 4
    assert all(report == reports[0] for report in reports)
    assert RunStore(Storage.open(tmp_path)).load("run-1").status is Status.COMPLETED


def test_a_close_that_failed_can_be_done_again(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = start()
    service.append(0, service.begin_attempt(1), events(range(1, 4)))
    real = Storage.write_bytes

    def write_bytes(self: Storage, name: str, data: Any) -> None:
        raise StorageError("no space left on device")

    monkeypatch.setattr(Storage, "write_bytes", write_bytes)
    with pytest.raises(StorageError, match="no space"):
        service.close("completed", "done")
    monkeypatch.setattr(Storage, "write_bytes", real)
    service.close("completed", "done")
    assert RunStore(Storage.open(tmp_path)).load("run-1").status is Status.COMPLETED
    assert len(journal_of(tmp_path)) == 3


def test_a_completed_run_is_refused_and_a_failed_one_goes_on(start: Any, tmp_path: Path) -> None:
    for status, run_id in (("failed", "f"), ("completed", "c")):
        service = start(run_id=run_id)
        service.append(0, service.begin_attempt(1), events(range(1, 4)))
        service.close(status, status)
    again = start(run_id="f")
    attempt = again.begin_attempt(1)
    assert attempt == 2
    again.append(0, attempt, events(range(4, 6), seq=1))
    assert [step for _, _, step in points(journal_of(tmp_path, "f"))] == [1, 2, 3, 4, 5]
    with pytest.raises(RefusedError, match="'c' is completed"):
        start(run_id="c")


def attempt_row(step: int) -> bytes:
    return pack([(1, "attempt", step, 1.0, {"attempt": b""})])


def test_a_resume_takes_back_what_it_supersedes(start: Any, tmp_path: Path) -> None:
    service = start()
    first = service.begin_attempt(1)
    service.append(0, first, attempt_row(-1))
    service.append(0, first, events(range(1, 11), seq=2))  # loss = step / 2: best is the least, last 5.0
    service.append(0, first, pack([(12, "scalar", 11, 1.0, {"loss": -100.0, "late": 1.0})]))
    second = service.begin_attempt(1)
    service.append(0, second, attempt_row(6))
    service.append(0, second, events(range(7, 9), seq=2))
    report = service.close("completed", "done")
    assert report["last_step"] == 8
    assert report["metrics"] == {"loss": {"last": 4.0, "best": 0.5}}
    record = RunStore(Storage.open(tmp_path)).load("run-1")
    assert [attempt.resumed_from_step for attempt in record.attempts] == [-1, 6]
    saved = Summary.load(Storage.open(tmp_path).child("run-1"))
    assert (saved.last_step, saved.offset, list(saved.metrics)) == (8, 16, ["loss"])


def test_the_summary_is_saved_while_new_metrics_come_in(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keeper, which is the sign of life, must not die of a dictionary that changes under it."""
    monkeypatch.setattr(service_module, "_SUMMARY_SECONDS", 0.001)
    service = start()
    attempt = service.begin_attempt(1)
    for i in range(1, 60):
        service.append(0, attempt, pack([(i, "scalar", i, 1.0, {f"k{i}-{j}": 1.0 for j in range(200)})]))
    assert service._keeper.is_alive()
    service.close("completed", "done")
    assert len(Summary.load(Storage.open(tmp_path).child("run-1")).metrics) == 59 * 200


def test_the_keeper_outlives_a_storage_that_fails(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(service_module, "_SUMMARY_SECONDS", 0.01)
    service = start()
    failing, failures = [True], []
    real = service._save_summary

    def save() -> None:
        if failing:
            failures.append(True)
            raise RuntimeError("what no one thought of")
        real()

    monkeypatch.setattr(service, "_save_summary", save)
    wait_until(lambda: len(failures) > 2)
    assert service._keeper.is_alive()
    failing.clear()
    wait_until(lambda: Summary.load(Storage.open(tmp_path).child("run-1")).updated > 0)
    assert capsys.readouterr().err.count("upkeep failed") == 1


def test_a_damaged_segment_does_not_keep_a_run_from_going_on(start: Any, tmp_path: Path) -> None:
    service = start()
    attempt = service.begin_attempt(1)
    for begin in (1, 11, 21):
        service.append(0, attempt, events(range(begin, begin + 10)))
    run = Storage.open(tmp_path).child("run-1")
    names = sorted(name for name, _ in run.walk("journal"))
    run.write_bytes(names[1], b"torn")
    again = start()
    assert again.append(0, attempt, events(range(31, 41))) == 40
    assert again.last_step() == 40
    again.close("completed", "done")
    found = JournalReader(run, strict=False).read(0, 1000)
    assert [record.step for record in found] == [*range(1, 11), *range(21, 41)]


def test_a_backend_that_hangs_is_seen_from_outside(start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend("stuck")
    backend.gate.clear()
    monkeypatch.setattr(service_module, "create_backends", lambda _: [backend])
    monkeypatch.setattr(service_module, "_SUMMARY_SECONDS", 0.02)
    service = start({"delivery": {"deadline_secs": 0.1, "final_secs": 30}})
    service.append(0, service.begin_attempt(1), events(range(1, 4)))
    cursor = tmp_path / "run-1" / "cursors" / "stuck.json"
    wait_until(lambda: cursor.exists() and json.loads(cursor.read_bytes())["state"] == "hanging")
    assert service.status()["backends"] == {"stuck": "hanging"}
    backend.gate.set()
    assert service.close("completed", "done")["backends"]["stuck"]["state"] == "complete"
    assert len(shown(backend)) == 3


def rank_events(steps: range, value: float) -> bytes:
    return pack([(step, "rank_scalar", step, 1000.0 + step, {"time": value}) for step in steps])


def expected_over_ranks(steps: range, mean: float, least: float, greatest: float) -> list[tuple[str, int, float]]:
    return [
        (f"time/{name}", step, value)
        for step in steps
        for name, value in (("mean", mean), ("min", least), ("max", greatest))
    ]


@pytest.mark.parametrize("restart", [False, True])
def test_ranks_metrics_are_reduced_once_also_over_a_restart(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: bool
) -> None:
    backend = FakeBackend("shows")
    monkeypatch.setattr(service_module, "create_backends", lambda _: [backend])
    service = start({"enabled": True})
    attempt = service.begin_attempt(3)
    for rank in (0, 1):
        service.append(rank, attempt, rank_events(range(1, 11), float(rank)))
    service.append(2, attempt, rank_events(range(1, 5), 2.0))
    if restart:
        for delivery in service._deliveries:
            delivery.finish("interrupted", 0.0)
            delivery.join(60)
        service = start({"enabled": True})
    service.append(2, attempt, rank_events(range(1, 8), 2.0))  # rank 2 falls silent at step 7
    service.close("completed", "done")
    wanted = expected_over_ranks(range(1, 8), 1.0, 0.0, 2.0) + expected_over_ranks(range(8, 11), 0.5, 0.0, 1.0)
    table = JournalReader(Storage.open(tmp_path).child("run-1")).effective()
    found = list(zip(*(table[name].to_pylist() for name in ("key", "step", "value")), strict=True))
    assert sorted(found) == sorted(wanted)
    assert sorted(shown(backend)) == sorted(wanted)
    assert all(record.kind is not Kind.RANK_SCALAR for record in backend.records)
    kept = [record for record in journal_of(tmp_path) if record.kind is Kind.RANK_SCALAR]
    assert Counter(record.rank for record in kept) == {0: 10, 1: 10, 2: 7}


def test_reduced_rows_that_a_killed_tracker_left_out_are_made_up_for(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = start()
    attempt = service.begin_attempt(2)
    service.append(0, attempt, rank_events(range(1, 6), 0.0))
    monkeypatch.setattr(service._reducer, "add", lambda rows: [])  # killed between the two appends
    service.append(1, attempt, rank_events(range(1, 4), 1.0))
    again = start()
    again.append(1, attempt, rank_events(range(1, 6), 1.0))
    found = [(r.key, r.step, r.value) for r in journal_of(tmp_path) if r.kind is Kind.SCALAR]
    assert found == expected_over_ranks(range(1, 6), 0.5, 0.0, 1.0)


def test_a_new_attempt_reduces_what_the_one_before_left(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as it counts: a backend that can't forget is never shown a part of the ranks for steps that come again."""
    backend = FakeBackend("keeps", rewinds=False)
    monkeypatch.setattr(service_module, "create_backends", lambda _: [backend])
    service = start({"enabled": True})
    first = service.begin_attempt(2)
    service.append(0, first, attempt_row(-1))
    service.append(0, first, rank_events(range(2, 7), 1.0))
    second = service.begin_attempt(2)
    service.append(0, second, attempt_row(4))
    for rank in (0, 1):
        service.append(rank, second, rank_events(range(5, 9), 3.0))
    service.close("completed", "done")
    table = JournalReader(Storage.open(tmp_path).child("run-1")).effective()
    found = sorted(zip(*(table[name].to_pylist() for name in ("key", "step", "value")), strict=True))
    assert found == sorted(
        expected_over_ranks(range(2, 5), 1.0, 1.0, 1.0) + expected_over_ranks(range(5, 9), 3.0, 3.0, 3.0)
    )
    assert sorted(shown(backend)) == found


def test_a_request_to_stop_reaches_the_workers(start: Any, tmp_path: Path) -> None:
    service = start()
    attempt = service.begin_attempt(1)
    assert attempt == 1
    assert service.report_progress({"step": 1}) is False
    stopping.request(Storage.open(tmp_path).child("run-1"))
    wait_until(lambda: service.report_progress({"step": 2}))
    again = start()  # a tracker that is restarted meanwhile learns of it too
    wait_until(lambda: again.report_progress({"step": 3}))


def hung(rank: int, waits: bool, idle: float = 20.0) -> Report:
    return Report(5, idle, computes=False, waits=waits, patient=False, process=Process("h", 10 + rank))


def reason(tmp_path: Path) -> str | None:
    return RunStore(Storage.open(tmp_path)).load("run-1").attempts[-1].reason


def test_a_hang_is_the_cause_even_if_the_end_of_the_rank_is_heard_of_first(start: Any, tmp_path: Path) -> None:
    service = start()
    service.begin_attempt(2)
    assert service.hear_rank("g", 0, 2, hung(0, waits=True), 10.0) is None
    verdict = service.hear_rank("g", 1, 2, hung(1, waits=False), 10.0)
    assert verdict.actors == (1,)
    service.end_attempt("rank 1: the worker process died")
    assert "hung" in (reason(tmp_path) or "")


def test_a_hang_is_not_the_cause_of_what_comes_later(start: Any, tmp_path: Path) -> None:
    """Ranks of the group that is being ended go on hearing of it; the next attempt fails for a reason of its own."""
    service = start()
    service.begin_attempt(2)
    service.hear_rank("g", 0, 2, hung(0, waits=True), 10.0)
    service.hear_rank("g", 1, 2, hung(1, waits=False), 10.0)
    service.end_attempt("rank 1: the worker process died")
    assert service.hear_rank("g", 0, 2, hung(0, waits=True), 10.0) is not None  # none of those who act
    assert service.hear_rank("g", 1, 2, hung(1, waits=False), 10.0) is not None
    service.begin_attempt(2)
    service.end_attempt("rank 0: ValueError")
    assert reason(tmp_path) == "rank 0: ValueError"


def test_a_rank_that_only_hears_of_a_hang_does_not_make_it_the_cause(start: Any, tmp_path: Path) -> None:
    service = start()
    service.begin_attempt(2)
    service.hear_rank("g", 1, 2, hung(1, waits=False), 10.0)
    assert service.hear_rank("g", 0, 2, hung(0, waits=True), 10.0).actors == (1,)
    service.end_attempt("rank 1: ValueError")
    assert reason(tmp_path) == "rank 1: ValueError"
