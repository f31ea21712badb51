"""One backend filled from the journal, however it behaves."""

from __future__ import annotations

import os
import time
from typing import Any, ClassVar

import pytest

from ray_tracking.errors import BackendError, BackendRefusedError, LeaseLostError
from ray_tracking.records import Kind, Record
from ray_tracking.tracking.backends.base import BackendIdentity, RunInfo
from ray_tracking.tracking.cursor import BackendState, Cursor
from ray_tracking.tracking.delivery import Delivery
from tests.tracking.fakes import FakeBackend, FlakyStorage, Journal, PositionedBackend, shown, wait_until

pytestmark = pytest.mark.usefixtures("quick")
INFO = RunInfo("run-1", "run")


class TimedBackend(FakeBackend):
    """Notes when it is opened, in monotonic seconds."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.opened_at: list[float] = []

    def open(self, run: RunInfo, identity: BackendIdentity | None) -> BackendIdentity:
        self.opened_at.append(time.monotonic())
        return super().open(run, identity)


def deliver(journal: Journal, backend: FakeBackend, **options: Any) -> Delivery:
    delivery = Delivery(backend, INFO, journal.storage, journal.tail, **options)
    delivery.start()
    return delivery


def finish(delivery: Delivery, seconds: float = 30.0) -> Cursor:
    end = time.monotonic() + seconds
    delivery.finish("completed", end)
    return delivery.join(end + 1.0 - time.monotonic())


def test_everything_once_while_it_comes_in(journal: Journal) -> None:
    backend = FakeBackend(max_records=7)
    delivery = deliver(journal, backend)
    for begin in range(0, 100, 10):
        journal.points(range(begin, begin + 10))
        time.sleep(0.005)
    cursor = finish(delivery)
    assert (cursor.state, cursor.offset, cursor.delivered, cursor.error) == (BackendState.COMPLETE, 200, 200, None)
    assert [record.offset for record in backend.records] == list(range(200))
    assert max(backend.chunks) == 7
    assert backend.status == "completed"
    assert Cursor.load(journal.storage, "memory") == cursor


def test_what_came_before_the_tail_is_read_from_the_journal(journal: Journal) -> None:
    journal.tail._keep = 5
    for begin in range(0, 60, 20):
        journal.points(range(begin, begin + 20))
    backend = FakeBackend()
    cursor = finish(deliver(journal, backend))
    assert cursor.state is BackendState.COMPLETE
    assert [record.offset for record in backend.records] == list(range(120))


@pytest.mark.parametrize("error", [BackendError("503"), OSError("reset"), ValueError("odd"), KeyError("x")])
def test_a_failed_chunk_comes_again_and_no_other(journal: Journal, error: Exception) -> None:
    journal.points(range(20))
    backend = FakeBackend(max_records=10)
    delivery = Delivery(backend, INFO, journal.storage, journal.tail)
    real, fail_at = backend.write, [1, 3]

    def write(records: Any) -> None:
        if len(backend.chunks) in fail_at:
            fail_at.pop(0)
            raise error
        real(records)

    backend.write = write  # type: ignore[method-assign]
    delivery.start()
    cursor = finish(delivery)
    assert cursor.state is BackendState.COMPLETE
    assert [record.offset for record in backend.records] == list(range(40))
    assert backend.calls.count("open") == 3  # the contract: opened again after each failure


def test_fails_for_a_while_then_catches_up(journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    backend = FakeBackend(broken=BackendError("connection refused", hint="Start the server."))
    delivery = deliver(journal, backend)
    journal.points(range(10))
    wait_until(lambda: len(backend.calls) > 3)
    saved = Cursor.load(journal.storage, "memory")
    assert (saved.state, saved.offset) == (BackendState.FAILING, 0)
    assert saved.error == "connection refused\nStart the server."
    backend.broken = None
    wait_until(lambda: delivery.cursor.offset == 20)
    assert finish(delivery).error is None
    assert len(shown(backend)) == 20
    log = capsys.readouterr().err
    assert log.count("backend fails") == 1
    assert log.count("backend answers again") == 1


def test_down_to_the_end_is_pending_with_the_reason(journal: Journal) -> None:
    journal.points(range(10))
    backend = FakeBackend(broken=ConnectionError("nothing listens"))
    delivery = deliver(journal, backend)
    wait_until(lambda: len(backend.calls) > 1)
    began = time.monotonic()
    cursor = finish(delivery, 60.0)
    assert time.monotonic() - began < 5  # it was down before: not waited for to the last second
    assert (cursor.state, cursor.offset) == (BackendState.PENDING, 0)
    assert cursor.error == "ConnectionError: nothing listens"
    assert Cursor.load(journal.storage, "memory") == cursor


def test_one_that_failed_only_at_the_end_is_waited_for(journal: Journal) -> None:
    journal.points(range(10))
    backend = FakeBackend(failures=[BackendError("busy")] * 10)
    delivery = Delivery(backend, INFO, journal.storage, journal.tail)
    delivery.finish("completed", time.monotonic() + 10)
    delivery.start()
    cursor = delivery.join(10)
    assert cursor.state is BackendState.COMPLETE
    assert len(shown(backend)) == 20


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="scheduling policies are Linux's")
def test_it_stands_back_until_the_end_is_waited_for(journal: Journal) -> None:
    class Seen(FakeBackend):
        policies: ClassVar[list[int]] = []

        def write(self, records: Any) -> None:
            self.policies.append(os.sched_getscheduler(0))
            super().write(records)

        def close(self, status: str) -> None:
            self.policies.append(os.sched_getscheduler(0))
            super().close(status)

    backend = Seen()
    delivery = deliver(journal, backend, idle=True)
    journal.points(range(10))
    wait_until(lambda: len(shown(backend)) == 20)
    assert finish(delivery).state is BackendState.COMPLETE
    assert set(backend.policies[:-1]) == {os.SCHED_IDLE}
    assert backend.policies[-1] == os.SCHED_BATCH


def test_refusing_disables_it_with_one_warning(journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    journal.points(range(10))
    backend = FakeBackend(broken=BackendRefusedError("401", hint="Log in."))
    delivery = deliver(journal, backend)
    wait_until(lambda: delivery.cursor.state is BackendState.DISABLED)
    journal.points(range(10, 20))
    time.sleep(0.1)
    assert backend.calls == ["open"]
    cursor = finish(delivery)
    assert (cursor.state, cursor.error) == (BackendState.DISABLED, "401\nLog in.")
    assert capsys.readouterr().err.count("backend disabled") == 1
    again = FakeBackend()
    assert finish(deliver(journal, again)).state is BackendState.COMPLETE  # a later process tries anew
    assert len(shown(again)) == 40


def test_retry_after_is_honoured(journal: Journal) -> None:
    journal.points(range(3))
    backend = TimedBackend(failures=[BackendError("429", retry_after=0.4)])
    delivery = deliver(journal, backend)
    wait_until(lambda: len(shown(backend)) == 6)
    finish(delivery)
    first, second = backend.opened_at
    assert second - first >= 0.4


def test_hanging_is_said_and_bounded(journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    journal.points(range(10))
    backend = FakeBackend()
    delivery = deliver(journal, backend, deadline=0.1)
    wait_until(lambda: len(shown(backend)) == 20)
    backend.gate.clear()
    journal.points(range(10, 20))
    # The second call, which can't come back: the first may seem to hang too where this thread is slow.
    wait_until(lambda: backend.calls.count("write") == 2 and delivery.state.state is BackendState.HANGING)
    delivery.save_if_hanging()
    delivery.save_if_hanging()
    assert Cursor.load(journal.storage, "memory").state is BackendState.HANGING
    began = time.monotonic()
    cursor = finish(delivery, 0.2)
    assert time.monotonic() - began < 3
    assert (cursor.state, cursor.offset) == (BackendState.PENDING, 20)
    assert cursor.error is not None
    assert "no answer" in cursor.error
    assert capsys.readouterr().err.count("backend hangs") == 1
    backend.gate.set()


def test_one_that_hangs_for_a_while_loses_and_doubles_nothing(journal: Journal) -> None:
    backend = FakeBackend()
    delivery = deliver(journal, backend, deadline=0.01)
    for begin in range(0, 50, 10):
        backend.gate.clear()
        journal.points(range(begin, begin + 10))
        time.sleep(0.03)
        delivery.save_if_hanging()
        backend.gate.set()
    assert finish(delivery).state is BackendState.COMPLETE
    assert [record.offset for record in backend.records] == list(range(100))


def test_a_broken_one_does_not_hold_up_the_others(journal: Journal) -> None:
    backends = [
        FakeBackend("good"),
        FakeBackend("raises", broken=RuntimeError("plugin")),
        FakeBackend("hangs"),
        FakeBackend("refuses", broken=BackendRefusedError("403")),
        FakeBackend("slow", seconds=0.05, max_records=10),
    ]
    backends[2].gate.clear()
    deliveries = [deliver(journal, backend) for backend in backends]
    journal.points(range(20))
    wait_until(lambda: len(shown(backends[0])) == 40 and len(backends[1].calls) > 1)
    end = time.monotonic() + 30.0
    for delivery in deliveries:
        delivery.finish("completed", end)
    # The one that hangs is not waited for: it can't end before its gate is opened.
    seconds = [0.1 if not backend.gate.is_set() else 60.0 for backend in backends]
    states = [delivery.join(each).state.value for delivery, each in zip(deliveries, seconds, strict=True)]
    assert states == ["complete", "pending", "pending", "disabled", "complete"]
    assert len(shown(backends[4])) == 40
    backends[2].gate.set()


def test_an_error_at_close_is_pending(journal: Journal) -> None:
    journal.points(range(2))
    cursor = finish(deliver(journal, FakeBackend(broken_close=OSError("lost"))))
    assert (cursor.state, cursor.offset, cursor.error) == (BackendState.PENDING, 4, "OSError: lost")


def test_a_later_delivery_goes_on_at_the_cursor(journal: Journal) -> None:
    first = FakeBackend()
    journal.points(range(10))
    finish(deliver(journal, first))
    journal.points(range(10, 15))
    second = FakeBackend()
    cursor = finish(deliver(journal, second))
    assert [record.offset for record in second.records] == list(range(20, 30))
    assert second.opened[0] is not None
    assert second.opened[0].location == "memory"
    assert (cursor.offset, cursor.delivered) == (30, 30)


def test_goes_back_to_what_the_backend_holds(journal: Journal) -> None:
    """A client that was killed may have lost what it had taken: its position rules, if it is behind."""
    journal.points(range(10))
    finish(deliver(journal, FakeBackend()))
    behind = PositionedBackend(held=11)
    cursor = finish(deliver(journal, behind))
    assert [record.offset for record in behind.records] == list(range(12, 20))
    assert (cursor.offset, cursor.delivered) == (20, 20)
    ahead = PositionedBackend(held=500)
    finish(deliver(journal, ahead))
    assert ahead.records == []


def test_a_cursor_that_can_not_be_saved_stops_nothing(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = FakeBackend()
    storage = FlakyStorage(journal.storage.filesystem, journal.storage.root, journal.storage.uri)
    delivery = Delivery(backend, INFO, storage, journal.tail)
    storage.failures = 10**6
    delivery.start()
    for step in range(5):
        journal.points([step])
        time.sleep(0.06)
    wait_until(lambda: len(shown(backend)) == 10)
    storage.failures = 0
    assert finish(delivery).state is BackendState.COMPLETE
    assert Cursor.load(journal.storage, "memory").offset == 10
    assert capsys.readouterr().err.count("the cursor can't be saved") == 1


def test_kinds_it_can_not_show_are_said_and_passed_over(journal: Journal) -> None:
    backend = FakeBackend(kinds=frozenset({Kind.SCALAR}))
    journal.points([1])
    journal.add(Record(Kind.TEXT, "t", 1, 1.0, None, b"x"), Record(Kind.HISTOGRAM, "h", 1, 1.0, None, b"{}"))
    journal.points([2])
    cursor = finish(deliver(journal, backend))
    assert {record.kind for record in backend.records} == {Kind.SCALAR}
    assert cursor.unsupported == ["artifact", "histogram", "image", "param", "tag", "text"]
    assert (cursor.offset, cursor.state) == (6, BackendState.COMPLETE)


def two_attempts(journal: Journal) -> None:
    """Attempt 1 logs steps 1 to 8 and a param; attempt 2 resumes at 5 and logs 6 to 10."""
    journal.begin(1, -1)
    journal.add(Record(Kind.PARAM, "lr", 0, 1.0, None, b"1"))
    journal.points(range(1, 9))
    journal.begin(2, 5)
    journal.add(Record(Kind.PARAM, "lr", 0, 1.0, None, b"2", attempt=2))
    journal.points(range(6, 11), attempt=2)


@pytest.mark.parametrize("rewinds", [True, False])
@pytest.mark.parametrize("restart_at", [None, 0, 9, 17, 18, 19, 22, 25])
def test_a_resumed_attempt_shows_no_point_twice(journal: Journal, rewinds: bool, restart_at: int | None) -> None:
    """Also when a new tracker goes on at any place: before, at or behind the ATTEMPT row."""
    two_attempts(journal)
    backend = FakeBackend(rewinds=rewinds)
    if restart_at is not None:
        first = Delivery(backend, INFO, journal.storage, journal.tail)
        real = journal.tail.read
        journal.tail.read = lambda start, limit: (real(start, limit) or [])[: max(0, restart_at - start)]  # type: ignore[method-assign]
        first.start()
        finish(first)
        journal.tail.read = real  # type: ignore[method-assign]
        backend.status = None
    assert finish(deliver(journal, backend)).state is BackendState.COMPLETE
    expected = {(f"m{k}", step, step + k / 10) for step in range(1, 11) for k in range(2)}
    assert len(shown(backend)) == len(expected)
    assert set(shown(backend)) == expected
    assert [record.data for record in backend.records if record.kind is Kind.PARAM] == [b"1", b"2"]
    assert backend.calls.count("rewind 5") == (1 if rewinds else 0)


@pytest.mark.parametrize("rewinds", [True, False])
def test_a_worker_group_thought_dead_that_still_sends_is_not_shown(journal: Journal, rewinds: bool) -> None:
    two_attempts(journal)
    journal.points(range(9, 12), attempt=1, value=100.0)
    journal.points([11], attempt=2)
    backend = FakeBackend(rewinds=rewinds)
    finish(deliver(journal, backend))
    assert set(shown(backend)) == {(f"m{k}", step, step + k / 10) for step in range(1, 12) for k in range(2)}
    assert len(shown(backend)) == 22


def test_a_damaged_segment_leaves_a_loud_gap(journal: Journal) -> None:
    for begin in range(0, 30, 10):
        journal.points(range(begin, begin + 10))
    journal.tail._rows.clear()
    names = sorted(name for name, _ in journal.storage.walk("journal"))
    journal.storage.write_bytes(names[1], b"torn")
    backend = FakeBackend()
    cursor = finish(deliver(journal, backend))
    assert [record.offset for record in backend.records] == [*range(20), *range(40, 60)]
    assert cursor.offset == 60


def test_another_place_is_filled_from_the_beginning(journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    """Another server, or a run that was deleted there: what the cursor counts is not in it."""
    journal.points(range(10))
    Cursor("memory", offset=15, delivered=15, run_id="run-1", location="another").save(journal.storage)
    backend = FakeBackend()
    cursor = finish(deliver(journal, backend))
    assert [record.offset for record in backend.records] == list(range(20))
    assert (cursor.offset, cursor.delivered, cursor.location) == (20, 20, "memory")


def test_hanging_and_then_failing_is_said_once(journal: Journal, capsys: pytest.CaptureFixture[str]) -> None:
    """Every try hangs until the client's own time-out."""
    journal.points(range(10))
    backend = FakeBackend(seconds=0.05, broken=BackendError("timed out"))
    delivery = deliver(journal, backend, deadline=0.01)
    while len(backend.calls) < 5:
        delivery.save_if_hanging()
        time.sleep(0.005)
    backend.broken = None
    wait_until(lambda: delivery.cursor.offset == 20)
    finish(delivery)
    log = capsys.readouterr().err
    assert log.count("backend hangs") + log.count("backend fails") == 1
    assert log.count("backend answers again") == 1


def test_at_the_end_a_wait_that_was_asked_for_is_kept(journal: Journal) -> None:
    journal.points(range(10))
    backend = TimedBackend(failures=[BackendError("429", retry_after=0.5)])
    delivery = deliver(journal, backend)
    wait_until(lambda: delivery.cursor.state is BackendState.FAILING or len(backend.opened_at) > 1)
    assert finish(delivery).state is BackendState.COMPLETE
    first, second = backend.opened_at
    assert second - first >= 0.5
    longer = FakeBackend("longer", failures=[BackendError("429", retry_after=60.0)])
    delivery = deliver(journal, longer)
    wait_until(lambda: delivery.cursor.state is BackendState.FAILING)
    began = time.monotonic()
    assert finish(delivery).state is BackendState.PENDING
    assert time.monotonic() - began < 5  # there is not as much time: at once
    assert longer.calls.count("open") == 1


def test_closing_is_tried_again(journal: Journal) -> None:
    journal.points(range(2))
    backend = FakeBackend()
    real, failures = backend.close, [OSError("the reply was lost"), OSError("again")]

    def close(status: str) -> None:
        if failures:
            raise failures.pop()
        real(status)

    backend.close = close  # type: ignore[method-assign]
    cursor = finish(deliver(journal, backend))
    assert (cursor.state, cursor.error, backend.status) == (BackendState.COMPLETE, None, "completed")


def test_what_was_taken_but_could_not_be_flushed_is_not_complete(journal: Journal) -> None:
    journal.points(range(2))
    backend = FakeBackend()

    def flush() -> None:
        raise OSError("no space left on device")

    backend.flush = flush  # type: ignore[method-assign]
    cursor = finish(deliver(journal, backend))
    assert (cursor.state, cursor.offset) == (BackendState.PENDING, 4)
    assert cursor.error == "OSError: no space left on device"


def test_a_plugin_that_exits_is_isolated(journal: Journal) -> None:
    journal.points(range(2))
    delivery = deliver(journal, FakeBackend(broken=SystemExit(1)))
    wait_until(lambda: delivery.cursor.state is BackendState.FAILING)
    cursor = finish(delivery)
    assert (cursor.state, cursor.error) == (BackendState.PENDING, "SystemExit: 1")


def test_once_another_process_writes_the_run_nothing_more_is_shown_or_saved(
    journal: Journal, capsys: pytest.CaptureFixture[str]
) -> None:
    lost: list[LeaseLostError] = []

    def check() -> None:
        if lost:
            raise lost[0]

    backend = FakeBackend()
    delivery = deliver(journal, backend, check=check)
    journal.points(range(10))
    wait_until(lambda: delivery.cursor.offset == 20)
    lost.append(LeaseLostError("another one writes it"))
    wait_until(lambda: delivery.is_done)
    Cursor("memory", offset=7).save(journal.storage)  # as that one left it
    journal.points(range(10, 20))
    delivery.save_if_hanging()
    finish(delivery)
    assert len(shown(backend)) == 20
    assert backend.status is None
    assert Cursor.load(journal.storage, "memory").offset == 7
    assert capsys.readouterr().err.count("no longer filled by this process") == 1


def test_one_that_can_take_only_so_much_in_time_gets_less_at_once(journal: Journal) -> None:
    journal.points(range(500))
    backend = FakeBackend()
    real = backend.write

    def write(records: Any) -> None:
        if len(records) > 150:
            raise BackendError("timed out")
        real(records)

    backend.write = write  # type: ignore[method-assign]
    cursor = finish(deliver(journal, backend), 60)
    assert (cursor.state, cursor.offset) == (BackendState.COMPLETE, 1000)
    assert [record.offset for record in backend.records] == list(range(1000))
    assert max(backend.chunks) <= 150


def test_one_that_fails_every_now_and_then_is_warned_of_once_a_minute(
    journal: Journal, capsys: pytest.CaptureFixture[str]
) -> None:
    backend = FakeBackend()
    delivery = deliver(journal, backend)
    for begin in range(0, 50, 10):
        backend.failures.append(BackendError("busy"))
        journal.points(range(begin, begin + 10))
        wait_until(lambda end=begin + 10: len(shown(backend)) == 2 * end)  # type: ignore[misc]
    finish(delivery)
    log = capsys.readouterr().err
    assert [log.count(f"[{level}") for level in ("warning", "error")] == [1, 0]
    assert log.count("backend fails") == 5  # the others as information
