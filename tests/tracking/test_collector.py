"""What stays for good is not looked at by later garbage collections."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest

from ray_tracking.tracking.collector import settle
from ray_tracking.tracking.delivery import Delivery
from tests.tracking.fakes import FakeBackend, Journal, wait_until
from tests.tracking.test_delivery import INFO, finish


class Node:
    other: Any


def test_collects_only_what_comes_later() -> None:
    gc.unfreeze()
    settle()
    assert gc.get_freeze_count() > 10_000
    assert len(gc.get_objects()) < 10_000
    one, two = Node(), Node()
    one.other, two.other = two, one
    gone = weakref.ref(one)
    del one, two
    gc.collect()
    assert gone() is None


@pytest.mark.usefixtures("quick")
def test_each_backend_settles_once_it_is_open(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[bool] = []
    monkeypatch.setattr("ray_tracking.tracking.delivery.settle", lambda: settled.append(True))
    backend = FakeBackend(broken=OSError("down"))
    delivery = Delivery(backend, INFO, journal.storage, journal.tail)
    delivery.start()
    wait_until(lambda: backend.calls.count("open") > 2)
    assert not settled
    backend.broken = None
    journal.points(range(3))
    wait_until(lambda: delivery.cursor.offset == 6)
    backend.failures = [OSError("reset")]
    journal.points(range(3, 6))
    wait_until(lambda: delivery.cursor.offset == 12)
    finish(delivery)
    assert settled == [True]
