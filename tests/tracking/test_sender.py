"""From a log call to an acknowledged batch: each event once, in order, whatever fails on the way."""

from __future__ import annotations

import threading
import time
from collections import Counter
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from ray_tracking.errors import LeaseLostError, MetricError, RefusedError
from ray_tracking.records import Kind
from ray_tracking.tracking import sender as sender_module
from ray_tracking.tracking.sender import Sender
from ray_tracking.tracking.transport import TransportError
from tests.tracking.fakes import Clock, FakeTracker, wait_until


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "_RETRY_SECONDS", (0.001, 0.005))


def make(tracker: Any, **options: Any) -> Sender:
    return Sender(tracker, rank=0, attempt=1, **{"interval": 0.002, **options})


def logged(*metrics: Any, step: int | None = None) -> dict[str, float]:
    """The payload that the tracker gets of these calls, together."""
    tracker = FakeTracker()
    sender = make(tracker)
    log_metrics = sender.metrics_logger(Clock())
    for one in metrics:
        log_metrics(one, step)
    assert sender.close() == 0
    return {key: value for event in tracker.events for key, value in event.payload.items()}


@pytest.mark.parametrize("seed", range(5))
def test_exactly_once_and_in_order_over_a_tracker_that_fails(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender_module, "_BATCH_EVENTS", 7)
    tracker = FakeTracker(before=0.3, after=0.3, seed=seed)
    sender = make(tracker, memory_limit=500)
    clock = Clock()
    log_metrics = sender.metrics_logger(clock)
    for step in range(1, 301):
        clock.step = step
        log_metrics({"loss": step / 2})
        if step % 50 == 0:
            sender.put(Kind.TEXT, step, {"note": b"text"})
        if step % 40 == 0:
            time.sleep(0.005)
    assert sender.flush(60)
    scalars = [(event.step, event.payload) for event in tracker.events if event.kind == "scalar"]
    assert scalars == [(step, {"loss": step / 2}) for step in range(1, 301)]
    assert [event.seq for event in tracker.events] == list(range(1, 307))
    assert sender.close() == 0
    assert tracker.calls > len(tracker.events) / 7


def test_many_threads_lose_nothing() -> None:
    tracker = FakeTracker(before=0.2, after=0.2)
    sender = make(tracker)
    log_metrics = sender.metrics_logger(Clock())

    def work(number: int) -> None:
        for i in range(200):
            log_metrics({f"t{number}": float(i)})
            if i % 50 == 0:
                assert sender.flush(60)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sender.close() == 0
    found = Counter((key, value) for event in tracker.events for key, value in event.payload.items())
    assert found == {(f"t{n}", float(i)): 1 for n in range(4) for i in range(200)}


def test_nothing_logged_is_nothing_to_wait_for() -> None:
    """It makes no row, so that nothing would ever acknowledge it."""
    tracker = FakeTracker()
    sender = make(tracker)
    log_metrics = sender.metrics_logger(Clock())
    log_metrics({})
    log_metrics({"a": 1.0})
    log_metrics({})
    log_metrics({}, 7)
    assert sender.flush(60)
    assert sender.close() == 0
    assert [event.payload for event in tracker.events] == [{"a": 1.0}]


def test_in_place_changes_afterwards_change_nothing() -> None:
    tracker = FakeTracker()
    sender = make(tracker, interval=60.0)
    log_metrics = sender.metrics_logger(Clock())
    tensor, array, metrics = torch.tensor(1.0), np.array(2.0), {"a": 3.0}
    step = torch.tensor(5)
    log_metrics({"t": tensor, "n": array, "f": 0.5}, step)
    log_metrics({"t0": tensor})
    log_metrics(metrics, step)
    tensor.add_(100)
    array += 100
    metrics["a"] = 100.0
    step.add_(100)
    assert sender.close() == 0
    assert [(e.step, e.payload) for e in tracker.events] == [
        (5, {"t": 1.0, "n": 2.0, "f": 0.5}),
        (1, {"t0": 1.0}),
        (5, {"a": 3.0}),
    ]


def test_odd_values_arrive() -> None:
    class Own(dict[str, float]):
        pass

    payload = logged(
        {1: 0.5, ("a", 2): 1.0},
        {"fraction": Fraction(1, 4), "plain": 0.5},
        {"huge": 2**70, "float": 1.0},
        {"beyond": 10**400, "float": 1.0},
        {"flag": True, "count": 3},
        {"inf": float("inf"), "low": float("-inf")},
        {"numpy": np.float64(2.5)},
        {"nested": {"deep": {"x": 1}}},
        MappingProxyType({"proxy": 1.0}),
        Own(own=0.125),
        {},
    )
    assert {str(key): value for key, value in payload.items()} == {
        "1": 0.5, "('a', 2)": 1.0, "fraction": 0.25, "plain": 0.5, "huge": 2.0**70, "float": 1.0,
        "beyond": float("inf"), "flag": 1.0, "count": 3.0, "inf": float("inf"), "low": float("-inf"), "numpy": 2.5,
        "nested/deep/x": 1.0, "proxy": 1.0, "own": 0.125,
    }  # fmt: skip


@pytest.mark.parametrize(("metrics", "named"), [({"a": 1.0, "b": None}, "'b'"), ({"c": "x"}, "'c'"), ([1.0], "list")])
def test_what_is_no_number_raises_where_it_is_logged(metrics: Any, named: str) -> None:
    with pytest.raises(MetricError, match=named):
        logged(metrics)


@pytest.mark.parametrize("step", [1.5, "3", 2**63 + 0.5])
def test_a_step_that_is_none_raises(step: Any) -> None:
    with pytest.raises(MetricError, match="step"):
        logged({"a": 1.0}, step=step)


def test_a_step_beyond_the_journal_is_counted_and_holds_up_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = FakeTracker()
    sender = make(tracker, interval=60.0)
    log_metrics = sender.metrics_logger(Clock())
    log_metrics({"before": 1.0})
    log_metrics({"lost": 1.0}, 2**63)
    log_metrics({"after": 1.0})
    assert sender.close() == 0
    assert [list(event.payload) for event in tracker.events] == [["before"], ["after"]]
    assert [event.seq for event in tracker.events] == [1, 2]
    assert sender.rejected == 1
    assert "a log call could not be sent" in capsys.readouterr().err


def test_a_value_that_raises_when_it_is_read_later(capsys: pytest.CaptureFixture[str]) -> None:
    class Spiteful(Fraction):
        """Sums to a float, then can't be made one."""

        def __float__(self) -> float:
            raise KeyError("spite")

        def __radd__(self, other: Any) -> float:
            return 0.5

    tracker = FakeTracker()
    sender = make(tracker)
    log_metrics = sender.metrics_logger(Clock())
    log_metrics({"bad": Spiteful(1, 2)})
    sender._take()
    log_metrics({"good": 1.0})
    assert sender.flush(60)
    assert [event.payload for event in tracker.events] == [{"good": 1.0}]
    assert sender.latest() == {"good": 1.0}
    assert sender.rejected == 1
    assert "KeyError" in capsys.readouterr().err
    assert sender.close() == 0


def test_latest_and_last_step() -> None:
    sender = make(FakeTracker(), interval=60.0)
    clock = Clock(4)
    log_metrics = sender.metrics_logger(clock)
    assert sender.last_step() is None
    log_metrics({"a": 1.0, "b": 2.0})
    assert sender.last_step() == 4
    log_metrics({"a": 3.0}, 2)
    sender.put(Kind.TEXT, 99, {"t": b""})
    assert sender.last_step() == 2
    assert sender.latest() == {"a": 3.0, "b": 2.0}
    sender.close()


def test_flush_waits_for_the_acknowledgement() -> None:
    tracker = FakeTracker()
    tracker.open.clear()
    sender = make(tracker)
    sender.metrics_logger(Clock())({"a": 1.0})
    assert sender.flush(0.1) is False
    tracker.open.set()
    assert sender.flush(60) is True
    assert len(tracker.events) == 1
    sender.close()


def test_flush_of_nothing_is_done() -> None:
    sender = make(FakeTracker())
    assert sender.flush(0) is True
    assert (sender.close(), sender.close()) == (0, 0)


@pytest.mark.parametrize("error", [RefusedError("no"), ValueError("odd"), MemoryError(), TransportError("gone")])
def test_the_courier_outlives_every_error(error: Exception) -> None:
    tracker = FakeTracker()
    tracker.error = error
    sender = make(tracker)
    sender.metrics_logger(Clock())({"a": 1.0})
    wait_until(lambda: tracker.calls > 2)
    tracker.error = None
    assert sender.flush(60)
    assert len(tracker.events) == 1
    assert sender.close() == 0


def test_what_never_arrives_is_counted_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    tracker = FakeTracker()
    tracker.error = TransportError("the tracker process ended")
    sender = make(tracker)
    log_metrics = sender.metrics_logger(Clock())
    for i in range(5):
        log_metrics({"a": float(i)})
    began = time.monotonic()
    assert sender.close(timeout=0.2) == 5
    assert sender.close() == 5
    assert time.monotonic() - began < 5
    shown = capsys.readouterr().err
    assert shown.count("tracking records lost") == 1
    assert "the tracker process ended" in shown


def test_close_is_bounded_while_the_tracker_hangs() -> None:
    tracker = FakeTracker()
    tracker.open.clear()
    sender = make(tracker)
    sender.metrics_logger(Clock())({"a": 1.0})
    began = time.monotonic()
    assert sender.close(timeout=0.2) == 1
    assert time.monotonic() - began < 3
    tracker.open.set()


def test_batches_stay_small_when_events_are_large() -> None:
    sizes: list[int] = []

    class Sized(FakeTracker):
        def append(self, rank: int, attempt: int, batch: bytes) -> int:
            sizes.append(len(batch))
            return super().append(rank, attempt, batch)

    tracker = Sized()
    sender = make(tracker, interval=60.0)
    for i in range(20):
        sender.put(Kind.IMAGE, i, {"i": bytes(1 << 20)})
    sender.metrics_logger(Clock())({f"k{i}": 1.0 for i in range(100_000)})
    assert sender.close() == 0
    assert max(sizes) < 8 << 20
    assert sum(len(event.payload) for event in tracker.events) == 100_020


def test_a_run_that_another_process_writes_is_given_up_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    tracker = FakeTracker()
    sender = make(tracker, memory_limit=1000)
    log_metrics = sender.metrics_logger(Clock())
    log_metrics({"loss": 1.0}, 1)
    assert sender.flush(60)
    tracker.error = LeaseLostError("the run is written by pid 7 on far", run="r", epoch=2)
    log_metrics({"loss": 2.0}, 2)
    with pytest.raises(LeaseLostError, match="pid 7 on far") as lost:
        sender.flush(30)
    assert lost.value.epoch == 2
    calls = tracker.calls
    for step in range(3, 5000):
        log_metrics({"loss": 1.0}, step)
    with pytest.raises(LeaseLostError):
        sender.flush(30)
    assert len(sender._events) == 0, "what nobody will take does not pile up"
    began = time.monotonic()
    assert sender.close(30.0) == 4998
    assert time.monotonic() - began < 5
    assert tracker.calls == calls, "not tried again"
    assert [event.step for event in tracker.events] == [1]
    said = capfd.readouterr().err
    assert said.count("written by another process") == 1
    assert "records lost" not in said
