from __future__ import annotations

import pytest

from ray_tracking.runtime.preemption import Notices


@pytest.mark.parametrize(
    ("deadline", "write_seconds", "saved_at"),
    [
        (None, 1.0, [10]),  # nobody says when: once, at the notice
        (100.0, 0.0, [10, 93]),  # and once more in time for the deadline
        (100.0, 20.0, [10, 53]),  # earlier if a save takes long
        (20.0, 20.0, [10, 11]),  # the notice came late
        (9.0, 0.0, [10]),  # the deadline is past
    ],
)
def test_one_save_at_the_notice_and_one_before_the_deadline(
    deadline: float | None, write_seconds: float, saved_at: list[int]
) -> None:
    notices = Notices()
    seconds = range(5, 120)
    due = [now for now in seconds if notices.is_due(now >= 10, deadline, float(now), write_seconds)]
    assert due == saved_at


def test_another_machine_that_goes_earlier_is_saved_for_too() -> None:
    notices = Notices()
    assert notices.is_due(True, 100.0, 10.0, 0.0)
    assert notices.is_due(True, 100.0, 94.0, 0.0)
    assert not notices.is_due(True, 100.0, 95.0, 0.0)
    assert notices.is_due(True, 101.0, 96.0, 0.0)
