"""When a backend that fails is tried again, as a table."""

from __future__ import annotations

import pytest

from ray_tracking.tracking.patience import Patience, retry_wait


def test_retry_wait_table() -> None:
    assert [retry_wait(n, None) for n in range(1, 10)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert [retry_wait(n, 10.0) for n in (1, 4, 5, 100)] == [10, 10, 16, 60]
    assert retry_wait(1, 300.0) == 300
    assert retry_wait(10**6, None) == 60


def test_the_circuit_opens_for_longer_with_each_failure_and_closes_with_a_success() -> None:
    patience = Patience()
    assert [patience.failed(0.0, None, at_end=False) for _ in range(4)] == [1, 2, 4, 8]
    patience.succeeded()
    assert patience.failed(0.0, None, at_end=False) == 1
    assert not patience.is_exhausted(10**6, None)  # while the run goes on: never


def test_one_that_was_down_gets_three_more_tries_at_the_end_and_one_that_was_up_all_the_time() -> None:
    down, up = Patience(), Patience()
    down.failed(0.0, None, at_end=False)
    exhausted = []
    for _ in range(5):
        for patience in (down, up):
            patience.failed(0.0, None, at_end=True)
        exhausted.append((down.is_exhausted(0.0, 20.0), up.is_exhausted(0.0, 20.0)))
    assert exhausted == [(False, False), (False, False), (True, False), (True, False), (True, False)]
    down.succeeded()
    assert not down.is_exhausted(0.0, 20.0)


@pytest.mark.parametrize(
    ("retry_after", "left", "pause", "exhausted"),
    [(None, 20.0, 1.0, False), (None, 0.3, 0.3, False), (5.0, 20.0, 5.0, False), (25.0, 20.0, 25.0, True)],
)
def test_what_a_backend_asked_for_holds_at_the_end_too(
    retry_after: float | None, left: float, pause: float, exhausted: bool
) -> None:
    patience = Patience()
    patience.failed(100.0, retry_after, at_end=True)
    assert patience.last_pause(100.0, left, failed_at_end=True) == pause
    assert patience.is_exhausted(100.0, left) is exhausted


def test_the_end_of_the_run_cuts_a_wait_short_but_not_one_that_was_asked_for() -> None:
    ours, asked = Patience(), Patience()
    for _ in range(6):
        ours.failed(100.0, None, at_end=False)
    asked.failed(100.0, 8.0, at_end=False)
    assert ours.last_pause(102.0, 20.0, failed_at_end=False) == 0
    assert asked.last_pause(102.0, 20.0, failed_at_end=False) == 6


def test_tries() -> None:
    patience = Patience(tries=3)
    waits = []
    while not patience.is_exhausted(0.0, None):
        patience.failed(0.0, None, at_end=True)
        waits.append(patience.last_pause(0.0, 10**9, failed_at_end=True))
    assert waits == [1, 2, 4]
    patience = Patience(tries=3)
    patience.failed(0.0, 3600.0, at_end=True)
    assert patience.is_exhausted(0.0, None)  # nobody sits through an hour
