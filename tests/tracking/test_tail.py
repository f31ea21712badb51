"""The newest rows in memory, bounded in number and bytes."""

from __future__ import annotations

import threading
import time

from ray_tracking.records import Kind, Record
from ray_tracking.tracking.tail import Tail


def rows(begin: int, end: int, data: bytes | None = None) -> list[Record]:
    return [Record(Kind.TEXT, "k", i, 0.0, None, data, offset=i) for i in range(begin, end)]


def test_reads_what_it_has_and_says_what_it_has_not() -> None:
    tail = Tail(10, keep=5)
    assert tail.read(10, 5) == []
    assert tail.read(9, 5) is None
    tail.add(rows(10, 20))
    assert tail.next_offset == 20
    assert tail.read(14, 5) is None
    assert tail.read(15, 3) == rows(15, 18)
    assert tail.read(18, 30) == rows(18, 20)
    assert tail.read(20, 30) == []


def test_large_rows_do_not_pile_up() -> None:
    tail = Tail(0, keep_bytes=10_000)
    for i in range(50):
        tail.add(rows(i, i + 1, bytes(3000)))
    assert tail.read(46, 9) is None
    assert tail.read(47, 9) == rows(47, 50, bytes(3000))
    tail.add(rows(50, 51, bytes(20_000)))
    assert tail.read(50, 1) is None
    assert tail.read(51, 1) == []


def test_waits_until_there_is_a_row_or_it_is_woken() -> None:
    tail = Tail(0)
    began = time.monotonic()
    threading.Timer(0.05, lambda: tail.add(rows(0, 1))).start()
    tail.wait(0, 60)
    woken = threading.Event()

    def wake() -> None:
        while not woken.wait(0.05):  # one that comes before the wait is lost
            tail.wake()

    threading.Thread(target=wake).start()
    tail.wait(1, 60)
    woken.set()
    tail.wait(0, 60)
    assert time.monotonic() - began < 30
    tail.wait(1, 0.01)


def test_does_not_wait_for_what_is_over() -> None:
    began = time.monotonic()
    Tail(0).wait(0, 60, lambda: True)
    assert time.monotonic() - began < 30
