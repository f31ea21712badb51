"""Batches wait in order, in memory or on disk, until they are acknowledged."""

from __future__ import annotations

import tempfile
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_tracking.tracking.outbox import Batch, Outbox


def batch(first: int, last: int, size: int = 10) -> Batch:
    return Batch(first, last, bytes([first % 251]) * size)


def drain(outbox: Outbox) -> list[Batch]:
    found = []
    while (head := outbox.peek()) is not None:
        found.append(head)
        outbox.acknowledge(head.last)
    return found


def test_stays_until_it_is_acknowledged() -> None:
    outbox = Outbox()
    outbox.put(batch(1, 4))
    outbox.put(batch(5, 5))
    assert outbox.peek() == outbox.peek() == batch(1, 4)
    outbox.acknowledge(3)
    assert outbox.peek() == batch(1, 4)
    assert outbox.events == 5
    outbox.acknowledge(4)
    assert outbox.peek() == batch(5, 5)
    outbox.acknowledge(99)
    assert outbox.peek() is None
    assert (len(outbox), outbox.events) == (0, 0)


def test_spills_what_exceeds_the_limit_and_gives_the_file_back() -> None:
    outbox = Outbox(memory_limit=25)
    sent = [batch(i, i) for i in range(1, 8)]
    for one in sent:
        outbox.put(one)
    assert outbox.spilled == 5
    assert drain(outbox) == sent
    assert outbox.spilled == 0
    assert outbox._file is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 40), st.none()), max_size=60))
def test_in_order_whatever_the_interleaving(actions: list[int | None]) -> None:
    """None: acknowledge the head; a number: put a batch of that size."""
    outbox, expected, number = Outbox(memory_limit=60), deque[Batch](), 0
    for action in actions:
        if action is None:
            head = outbox.peek()
            assert head == (expected[0] if expected else None)
            if head is not None:
                outbox.acknowledge(head.last)
                expected.popleft()
        else:
            number += 1
            one = batch(number, number, action)
            outbox.put(one)
            expected.append(one)
    assert outbox._memory_bytes <= 60
    assert drain(outbox) == list(expected)


def test_a_full_disk_keeps_it_in_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_space(**_: Any) -> Any:
        raise OSError(28, "No space left on device")

    real = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", no_space)
    outbox = Outbox(memory_limit=5)
    sent = [batch(i, i) for i in range(1, 7)]
    for one in sent[:3]:
        outbox.put(one)
    monkeypatch.setattr(tempfile, "TemporaryFile", real)
    for one in sent[3:]:
        outbox.put(one)
    assert outbox.spilled == 3
    assert drain(outbox) == sent
    assert capsys.readouterr().err.count("takes no more waiting records") == 1


def test_a_spill_file_that_lost_bytes_is_no_batch() -> None:
    outbox = Outbox(memory_limit=0)
    outbox.put(batch(1, 1))
    assert outbox._file is not None
    outbox._file.truncate(4)  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="lacks 6 bytes"):
        outbox.peek()
