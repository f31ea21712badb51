from __future__ import annotations

import itertools

import pytest

from ray_tracking.runtime import agenda
from ray_tracking.runtime.agenda import PREEMPTED, STOP, TIMED, Agenda


@pytest.mark.parametrize("step_seconds", [0.001, 0.02, 0.3, 5.0])
def test_the_ranks_meet_about_once_a_second(monkeypatch: pytest.MonkeyPatch, step_seconds: float) -> None:
    now = 0.0
    meetings: list[float] = []
    monkeypatch.setattr(agenda.time, "monotonic", lambda: now)
    ranks = Agenda(lambda: meetings.append(now) or 0)  # type: ignore[func-returns-value]
    for _ in range(max(100, int(40 / step_seconds))):
        now += step_seconds
        ranks.after_step()
    gaps = [after - before for before, after in itertools.pairwise(meetings[15:])]
    assert gaps
    assert all(gap <= max(1.1, step_seconds * 1.01) for gap in gaps)
    assert all(gap >= min(0.5, step_seconds * 1000) for gap in gaps), "no more often than that costs"


def test_flags_are_told_once_but_stop_stays() -> None:
    flags = [TIMED, 0, PREEMPTED | STOP, 0, 0]
    ranks = Agenda(lambda: flags.pop(0))
    ranks._steps_until = lambda now: 1  # type: ignore[method-assign]
    ranks.after_step()
    ranks.after_step()
    assert ranks.take() == (True, False), "what was said at a meeting waits until it is taken"
    assert ranks.take() == (False, False)
    assert not ranks.stop
    ranks.after_step()
    assert ranks.take() == (False, True)
    ranks.after_step()
    assert ranks.take() == (False, False)
    assert ranks.stop


def test_meetings_since_the_stop_are_counted() -> None:
    flags = [0, STOP, STOP, 0]
    ranks = Agenda(lambda: flags.pop(0))
    ranks._steps_until = lambda now: 1  # type: ignore[method-assign]
    counted = []
    for _ in range(4):
        ranks.after_step()
        counted.append(ranks.meetings_since_stop)
    assert counted == [-1, 0, 1, 2]
